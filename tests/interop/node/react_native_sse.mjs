// react-native-sse, on an XMLHttpRequest that behaves like React Native's and not like a browser's:
// when an answer breaks off, its status stays, and the text is replaced by what went wrong; when
// there is no answer, the status is 0. (`__didReceiveResponse` and `__didCompleteResponse` in
// packages/react-native/Libraries/Network/XMLHttpRequest.js.) A browser's status is 0 in both cases.
import http from "node:http";
import { createRequire } from "node:module";
import { StringDecoder } from "node:string_decoder";
import { closed, event, say } from "./say.mjs";

class XMLHttpRequest {
  static HEADERS_RECEIVED = 2;
  static LOADING = 3;
  static DONE = 4;
  readyState = 0;
  status = 0;
  responseText = "";
  headers = {};

  open(method, url) {
    this.url = url;
  }

  setRequestHeader(name, value) {
    this.headers[name] = value;
  }

  send() {
    this.request = http.get(this.url, { headers: this.headers }, (response) => {
      const decoder = new StringDecoder("utf8");
      this.status = response.statusCode;
      this.#move(XMLHttpRequest.HEADERS_RECEIVED);
      response.on("data", (bytes) => {
        this.responseText += decoder.write(bytes);
        this.#move(XMLHttpRequest.LOADING);
      });
      response.on("end", () => this.#done());
      response.on("error", (error) => this.#done(error));
    });
    this.request.on("error", (error) => this.#done(error));
  }

  abort() {
    this.aborted = true;
    this.request?.destroy();
  }

  #move(state) {
    this.readyState = state;
    if (!this.aborted) this.onreadystatechange?.();
  }

  #done(error) {
    if (this.aborted || this.readyState === XMLHttpRequest.DONE) return;
    if (error) this.responseText = error.message;
    this.#move(XMLHttpRequest.DONE);
    if (error && !this.aborted) this.onerror?.(error);
  }
}
globalThis.XMLHttpRequest = XMLHttpRequest;

const { default: EventSource } = createRequire(import.meta.url)("react-native-sse");
const [url, ...names] = process.argv.slice(2);
const source = new EventSource(url, { timeoutBeforeConnection: 0 });
for (const type of ["message", "welcome", "gap", "busy", ...names])
  source.addEventListener(type, (message) => {
    if (event(message.type, message.data, message.lastEventId)) {
      source.close();
      closed("by itself");
    }
  });
source.addEventListener("error", (error) => say({ error: `${error.xhrStatus}` }));
