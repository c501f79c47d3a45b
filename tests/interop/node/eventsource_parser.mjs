// eventsource-parser is a parser alone; fetch and the loop around it are a user's.
import { createParser } from "eventsource-parser";
import { closed, event, say } from "./say.mjs";

const url = process.argv[2];
let lastId = "", pause = 1000, open = true;

while (open) {
  const stop = new AbortController();
  const parser = createParser({
    onEvent(message) {
      lastId = message.id ?? lastId;
      if (event(message.event, message.data, message.id)) {
        open = false;
        stop.abort();
        closed("by itself");
      }
    },
    onRetry(milliseconds) { pause = milliseconds; },
  });
  try {
    const headers = { Accept: "text/event-stream", ...(lastId && { "Last-Event-ID": lastId }) };
    const response = await fetch(url, { headers, signal: stop.signal });
    if ([204, 401].includes(response.status)) {
      closed(response.status);
      break;
    }
    const decoder = new TextDecoder();
    for await (const bytes of response.body) parser.feed(decoder.decode(bytes, { stream: true }));
    say({ error: "the stream ended" });
  } catch (error) {
    if (open) say({ error: String(error) });
  }
  await new Promise((resolve) => setTimeout(resolve, pause));
}
