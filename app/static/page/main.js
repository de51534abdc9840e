/* The page: four places, and above them who is there. */

import { html, render, useEffect, useState } from "./vendor/preact-htm.js";
import { connection } from "./api.js";
import { Generate } from "./generate.js";
import { history } from "./history.js";
import { Look } from "./look.js";
import { Noise } from "./noise.js";
import { useObservable } from "./observable.js";
import { Modal } from "./parts.js";
import { Queue } from "./queue.js";
import { PLACES, placeOf, router } from "./router.js";
import { runOf } from "./runs.js";
import { service } from "./service.js";
import { compact, count } from "./words.js";

const VIEWS = { generate: Generate, noise: Noise, look: Look, queue: Queue };

/* Who works, in a few words; the width of its place does not depend on them. */
function Presence() {
  useObservable(service);
  useObservable(connection);
  if (!service.known || connection.away) return html`<span class="presence"></span>`;
  const rates = service.models.map((model) => model.image_steps_per_s).filter(Boolean);
  const busy = service.queues.reduce((sum, queue) => sum + queue.queued + queue.running, 0);
  const words = service.idle
    ? "no worker: jobs wait"
    : [count(service.workers.length, "worker"),
      rates.length && `${compact(Math.max(...rates))} steps/s`,
      busy && count(busy, "job")].filter(Boolean).join(" · ");
  return html`<a class=${`presence ${service.idle ? "idle" : "there"}`} href="#queue">${words}</a>`;
}

/* Above everything while the service is away. It is in nothing's way, and moves nothing. The seconds
   are no part of what is read out. */
function Away() {
  useObservable(connection);
  const [now, setNow] = useState(Date.now());
  useEffect(() => {
    if (!connection.away) return undefined;
    const timer = setInterval(() => setNow(Date.now()), 500);
    return () => clearInterval(timer);
  }, [connection.away]);
  const { away, why, next } = connection;
  const left = Math.max(0, Math.ceil((next - now) / 1000));
  return html`<div class=${away ? "away shown" : "away"} id=${away ? "away" : undefined}>
    <div><span role="status">${away && html`Reconnecting… <small>${why}. Nothing is lost: jobs go on
      without this page.</small>`}</span>
      ${away && html`<small>${left ? `Again in ${left} s` : "Asking"}</small>`}</div>
    ${away && html`<button type="button" onClick=${() => connection.hurry()}>Try now</button>`}</div>`;
}

/* The key, asked for where keys are set, before anything else can be done. */
function Lock() {
  useObservable(connection);
  return connection.locked && html`<${Key} />`;
}

function Key() {
  const [key, setKey] = useState("");
  const give = (event) => { event.preventDefault(); connection.key = key.trim(); };
  return html`<${Modal} title="This service needs a key"><form class="lock" onSubmit=${give}>
    <p>Ask who runs it for one. It is kept in this browser, and sent to this address alone.</p>
    <label>Key <input id="key" type="password" autocomplete="current-password" required
      value=${key} onInput=${(event) => setKey(event.target.value)}
      aria-invalid=${connection.refused} aria-describedby="key-fault" /></label>
    <p class="bad" id="key-fault" role="alert">${connection.refused ? "This key is not accepted." : ""}</p>
    <button class="go">Use this key</button>
  </form><//>`;
}

/* The run that the link names; without one, the last that was shown at this place. */
function useRun() {
  useObservable(router);
  const id = router.job ?? router.latest[router.place];
  const run = id ? runOf(id) : null;
  useObservable(run);
  useEffect(() => run?.open(), [run, location.hash]); // whenever somebody comes to it
  const job = run?.job ?? (id && history.of(id) && { ...history.of(id), request: {
    source: history.of(id).parent ?? "image" } });
  const place = router.job ? placeOf(job) : router.place;
  if (job) router.latest[place] = id; // before it is known, so is its place
  return { place, run };
}

function App() {
  const { place, run } = useRun();
  const View = VIEWS[place];
  useEffect(() => { document.title = `${PLACES[place]} · ddpm-serve`; }, [place]);
  return html`
    <a class="skip" href="#main" onClick=${(event) => {
      event.preventDefault();
      document.getElementById("main").focus();
    }}>To the work</a>
    <header>
      <h1>ddpm</h1>
      <nav aria-label="Places">${Object.entries(PLACES).map(
        ([name, words]) => html`<a key=${name} href=${`#${name}`}
          aria-current=${name === place ? "page" : undefined}>${words}</a>`)}</nav>
      <${Presence} />
      ${connection.key && html`<button type="button" class="quiet" id="forget"
        onClick=${() => { connection.key = ""; location.reload(); }}>Forget key</button>`}
      <a class="docs" href="docs">API</a>
    </header>
    <main id="main" class=${place} tabindex="-1"><${View} key=${place} run=${run} /></main>
    <${Away} /><${Lock} />`;
}

service.watch();
const app = document.getElementById("app");
app.replaceChildren();
render(html`<${App} />`, app);
