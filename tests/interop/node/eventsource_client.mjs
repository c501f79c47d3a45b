// eventsource-client reconnects by itself. It tells its user no status; a `fetch` of the user's
// own, which it can be given, sees it.
import { createEventSource } from "eventsource-client";
import { closed, event, say } from "./say.mjs";

const source = createEventSource({
  url: process.argv[2],
  async fetch(url, options) {
    const response = await fetch(url, options);
    if (response.status === 204 || response.status === 401) {
      source.close();
      closed(response.status);
    }
    return response;
  },
  onMessage(message) {
    if (event(message.event, message.data, message.id)) {
      source.close();
      closed("by itself");
    }
  },
  onScheduleReconnect() {
    say({ error: "comes back" });
  },
});
