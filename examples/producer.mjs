// Publish how busy processor and memory are, for dashboard.html.
//
// Run it, in the folder of sse_server.py, while the server runs with --publish-token SECRET:
//     SSE_PUBLISH_TOKEN=SECRET node examples/producer.mjs
import {cpus, freemem, totalmem} from "node:os";
import {setTimeout as sleep} from "node:timers/promises";

const headers = {Authorization: `Bearer ${process.env.SSE_PUBLISH_TOKEN}`};

// What cannot be published now is old in a second, so leave it out.
async function publish(channel, body) {
  const url = `http://127.0.0.1:6500/?channel=${channel}&event=${channel}`;
  try {
    const answer = await fetch(url, {method: "POST", headers, body, signal: AbortSignal.timeout(5000)});
    const text = await answer.text();
    if (!answer.ok) console.error(`not published: ${text.trim()}`);
  } catch (error) {
    console.error(`not published: ${error.cause?.message ?? error.message}`);
  }
}

// Milliseconds since the start of the machine, over all cores.
function times() {
  const sums = cpus().map(({times: {user, nice, sys, idle, irq}}) => ({busy: user + nice + sys + irq, idle}));
  return {busy: sums.reduce((sum, each) => sum + each.busy, 0), idle: sums.reduce((sum, each) => sum + each.idle, 0)};
}

let before = times();
while (true) {
  await sleep(1000);
  const now = times();
  const busy = now.busy - before.busy, all = busy + now.idle - before.idle;
  before = now;
  await publish("cpu", (100 * busy / (all || 1)).toFixed(1));
  await publish("memory", (100 * (1 - freemem() / totalmem())).toFixed(1));
}
