// better-sse on Node's http: a channel that broadcasts to all sessions.
if (process.argv.includes("--help")) {
  console.log("better-sse on Node's http. It takes the orders of serve.py; peers.py starts it.");
  process.exit();
}
const http = require("node:http");
const readline = require("node:readline");
const { setTimeout: sleep } = require("node:timers/promises");
const { createChannel, createSession } = require("better-sse");

const channel = createChannel();
const serializer = String;      // the default would put the data in JSON's quotes
let sequence = 0;

function payload() {
  // CLOCK_MONOTONIC, as Python's monotonic_ns
  const now = String(process.hrtime.bigint()).padStart(19, "0");
  return `${now} ${String(sequence).padStart(9, "0")} `.padEnd(68, "x");
}

async function publish(events, pause) {
  let due = performance.now();
  for (let i = 0; i < events; i++) {
    channel.broadcast(payload(), "message", { eventId: String(sequence++) });
    due += pause / 1e3;
    if (pause) await sleep(Math.max(0, due - performance.now()));
  }
}

async function obey() {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const [events, pause] = line.trim().split(/\s+/).map(Number);
    await publish(events, pause);
    console.log("done");
  }
  process.exit(0);
}

const server = http.createServer(async (request, response) => {
  channel.register(await createSession(request, response, { serializer }));
});
server.listen({ port: 0, host: "127.0.0.1", backlog: 1024 }, () => {
  console.log(server.address().port);
  obey();
});
