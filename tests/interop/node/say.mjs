// How a driver tells the test what its client sees: a JSON object on each line of its output.

// An event with this data asks the driver to close its client, as a program does that has enough.
export const CLOSE = "close yourself";

export const say = (line) => process.stdout.write(JSON.stringify(line) + "\n");

// Print an event, and return whether it asks to close.
export function event(name, data, id) {
  say({ event: name || "message", data, id: id ?? "" });
  return data === CLOSE;
}

// A client that is closed must stay so: the process lives on until the test ends it.
export function closed(why) {
  say({ closed: String(why) });
}
setInterval(() => {}, 1 << 30);
