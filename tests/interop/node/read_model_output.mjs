// Read a run with the stream decoder of a model's package: node read_model_output.mjs PACKAGE URL.
// Each package fetches the stream itself, by the method that it has for it. A line is printed for
// each object that it gives.
const [name, url] = process.argv.slice(2);
const module = await import(name);
const query = { since: "all", channel: "run" };

async function* chunks() {
  if (name === "ai") {
    const api = `${url}?${new URLSearchParams(query)}`;
    const prepareReconnectToStreamRequest = () => ({ api });
    const transport = new module.DefaultChatTransport({ api, prepareReconnectToStreamRequest });
    yield* await transport.reconnectToStream({ chatId: "run" });
  } else {
    const client = new module.default({ apiKey: "none", baseURL: url, maxRetries: 0 });
    yield* await client.get("", { query, stream: true });
  }
}

for await (const chunk of chunks()) console.log(JSON.stringify(chunk));
