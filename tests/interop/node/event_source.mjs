// Packages that have the EventSource of browsers: node event_source.mjs PACKAGE URL NAME...
import { CLOSE, closed, event, say } from "./say.mjs";

const [name, url, ...names] = process.argv.slice(2);
const module = await import(name);
const EventSource = module.EventSource ?? module.default;
const source = new EventSource(url);

for (const type of ["message", "welcome", "gap", "busy", ...names])
  source.addEventListener(type, (message) => {
    if (event(message.type, message.data, message.lastEventId)) {
      source.close();
      closed("by itself");
    }
  });
source.addEventListener("error", async (error) => {
  // Some tell of an error first and close then.
  await null;
  if (source.readyState === 2) closed(error.status ?? error.code ?? error.message ?? "error");
  else say({ error: String(error.message ?? "error") });
});
