// Print every event of a stream as a line of JSON: node listen.mjs URL NAME...
import { EventSource } from "eventsource-4";

const [url, ...names] = process.argv.slice(2);
const source = new EventSource(url);

const say = (line) => process.stdout.write(JSON.stringify(line) + "\n");
for (const name of ["message", "gap", ...names])
  source.addEventListener(name, (event) => say([event.type, event.data, event.lastEventId]));
source.addEventListener("open", () => console.error("open"));
source.addEventListener("error", () => console.error("error"));
