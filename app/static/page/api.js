/* All talk with the service: the key, refusals as errors, and patience while it is away.

Paths are relative to the page, so that it works behind any sub-path. */

import { Observable } from "./observable.js";
import { read, write } from "./storage.js";

const KEY = "ddpm-key";
const SILENCE_MS = 45_000; // a stream says something every 15 s
const LONGEST_WAIT_MS = 8_000;
const SENDABLE = /^[ -~\xa0-\xff]*$/; // what a header may hold: no other characters, seen or unseen

export class Refusal extends Error {
  constructor(status, body) {
    super(body.detail || body.title || `the service answered ${status}`);
    this.status = status;
    this.code = body.code || "";
    this.fields = body.errors || [];
  }
}

/* Whether the service answers, and whether it wants a key. `why` it is away; `next`: when it is
   asked again, in ms since the epoch. */
class Connection extends Observable {
  away = false;
  why = "";
  next = 0;
  locked = false;
  refused = false; // the key that is there is none
  #keyGiven = [];
  #hurry = [];

  get key() { return read(KEY); }

  set key(key) {
    write(KEY, key);
    this.refused = false;
    this.#tryAgain();
    this.changed();
  }

  #tryAgain() { this.#keyGiven.splice(0).forEach((go) => go()); }

  /* Wait until there is a key to try (again). */
  async unlocked(sent) {
    if (sent !== this.key) return; // another one is there by now
    this.locked = true;
    this.refused = sent !== "";
    this.changed();
    await new Promise((go) => this.#keyGiven.push(go));
  }

  heard() {
    if (!this.away && !this.locked) return;
    this.away = this.locked = this.refused = false;
    this.#tryAgain(); // what was refused beside this may be so no more
    this.changed();
  }

  lost(why) {
    this.away = true;
    this.why = why;
    this.changed();
  }

  hurry() { this.#hurry.splice(0).forEach((go) => go()); }

  pause(ms) {
    this.next = Date.now() + ms;
    this.changed();
    return new Promise((go) => { setTimeout(go, ms); this.#hurry.push(go); });
  }
}

export const connection = new Connection();
addEventListener("online", () => connection.hurry());
document.addEventListener("visibilitychange", () => document.hidden || connection.hurry());

/* signal: ends it, with its reason. */
export function pause(ms, signal) {
  return new Promise((go, stop) => {
    signal?.throwIfAborted();
    const cut = () => { clearTimeout(timer); stop(signal.reason); };
    const timer = setTimeout(() => { signal?.removeEventListener("abort", cut); go(); }, ms);
    signal?.addEventListener("abort", cut);
  });
}

const authorization = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function refusal(reply) {
  return new Refusal(reply.status, await reply.json().catch(() => ({})));
}

/* Whether this says that the service, or the Redis behind it, is not there at present. */
const passes = ({ status, code }) =>
  status === 502 || status === 504 || (status === 503 && (!code || code.startsWith("store_")));

/* Ask until it answers: 0.5 s, 1 s, 2 s … apart, at once when the browser is online again. */
let probing = null;

async function probe() {
  for (let wait = 500; ; wait = Math.min(2 * wait, LONGEST_WAIT_MS)) {
    await connection.pause(wait * (0.8 + 0.4 * Math.random()));
    try {
      const reply = await fetch("readyz", { signal: AbortSignal.timeout(10_000) });
      const problem = reply.ok ? null : await refusal(reply);
      if (!problem || !passes(problem)) return;
      connection.lost(problem.code ? problem.message : "the service is away");
    } catch {
      connection.lost("the service does not answer");
    }
  }
}

function comesBack(why) {
  connection.lost(why);
  probing ??= probe().finally(() => { probing = null; });
  return probing;
}

/* A request that succeeds, or a Refusal. Where it can be repeated without harm (`again`: of GET,
   and of what carries an Idempotency-Key), it waits for a service that is away, and for a key.
   signal: ends the waiting, and a GET at once. What makes a job is heard out: else nobody would know
   which to cancel. */
export async function call(path, { again, headers, signal, ...options } = {}) {
  const reads = (options.method ?? "GET") === "GET";
  const repeat = again ?? reads;
  for (;;) {
    signal?.throwIfAborted();
    const { key } = connection;
    if (!SENDABLE.test(key)) {
      await connection.unlocked(key);
      continue;
    }
    let reply;
    try {
      reply = await fetch(path.replace(/^\//, ""), {
        ...options, signal: reads ? signal : undefined,
        headers: { ...headers, ...authorization(key) } });
    } catch (error) {
      if (signal?.aborted || !repeat) throw error;
      await comesBack("the service does not answer");
      continue;
    }
    if (reply.ok) {
      connection.heard();
      return reply;
    }
    const problem = await refusal(reply);
    if (problem.status === 401) await connection.unlocked(key);
    else if (repeat && passes(problem)) await comesBack(problem.message);
    else throw problem;
  }
}

export const get = async (path, options) => (await call(path, options)).json();

/* `crypto.randomUUID` is there on https and localhost only. */
const nonce = () =>
  [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");

/* A new job; asked for twice it is still one. */
export async function create(kind, body, signal) {
  const reply = await call(kind, {
    method: "POST",
    again: true,
    signal,
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json", "Idempotency-Key": nonce() },
  });
  return reply.json();
}

/* Server-sent events through fetch: EventSource can send no key. */
async function* events(reply, silent) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let timer = 0;
  const alive = () => { clearTimeout(timer); timer = setTimeout(silent, SILENCE_MS); };
  try {
    for (;;) {
      alive();
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const event = { name: "message", data: "" };
        for (const line of block.split("\n")) {
          const at = line.indexOf(": ");
          if (at < 1) continue;
          const field = line.slice(0, at);
          if (field === "event") event.name = line.slice(at + 2);
          if (field === "data") event.data += line.slice(at + 2);
          if (field === "id") event.id = line.slice(at + 2);
        }
        if (event.data) yield { ...event, data: JSON.parse(event.data) };
      }
    }
  } finally {
    clearTimeout(timer);
  }
}

/* What happens to a job, to its end, however often the connection breaks in between. */
export async function* follow(id, signal) {
  let last = "";
  for (let wait = 250; ; wait = Math.min(2 * wait, LONGEST_WAIT_MS)) {
    const cut = new AbortController();
    const reply = await call(`jobs/${id}/events?inline=true`, {
      headers: last ? { "Last-Event-ID": last } : {},
      signal: AbortSignal.any([signal, cut.signal]),
    });
    if (reply.status === 204) return;
    try {
      for await (const event of events(reply, () => cut.abort())) {
        if (event.id) { last = event.id; wait = 250; }
        if (event.name === "error" && !event.data.status) break; // of the stream, not of the job
        yield event;
        if (event.name === "done" || event.name === "error") return;
      }
    } catch (error) {
      if (signal.aborted || error instanceof SyntaxError) throw error;
    }
    signal.throwIfAborted();
    await pause(wait);
  }
}
