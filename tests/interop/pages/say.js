// How a page tells the test what its client sees: each line is a POST of its own, in order.
const parameters = new URLSearchParams(location.search);
export const url = parameters.get("url");
export const names = ["message", "welcome", "gap", "busy", ...parameters.getAll("name")];

// An event with this data asks the page to close its client, as a program does that has enough.
export const CLOSE = "close yourself";

let last = Promise.resolve();
export function say(line) {
  const options = { method: "POST", mode: "no-cors", body: JSON.stringify(line) };
  last = last.then(() => fetch(parameters.get("report"), options));
}

// Report an event, and return whether it asks to close.
export function event(name, data, id) {
  say({ event: name || "message", data, id: id ?? "" });
  return data === CLOSE;
}

export function closed(why) {
  say({ closed: String(why) });
}

// Listen to whatever has the interface of an EventSource.
export function listen(source) {
  for (const name of names)
    source.addEventListener(name, (message) => {
      if (event(message.type, message.data, message.lastEventId)) {
        source.close();
        closed("by itself");
      }
    });
  source.addEventListener("error", () => {
    if (source.readyState === 2) closed("readyState 2");
    else say({ error: "error" });
  });
}
window.onerror = (message) => say({ fault: String(message) });
