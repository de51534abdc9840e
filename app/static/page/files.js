/* Out and in: files of a job, the same request as code, and a manifest to make it again. */

import { html, useRef, useState } from "./vendor/preact-htm.js";
import { Modal, download, save } from "./parts.js";
import { recipes } from "./recipes.js";

/* Open, and of a run whose request is known: by its link it may come later. */
export const CodeDialog = ({ open, run, onClose }) => open && run?.job
  && html`<${Code} key=${run.id} run=${run} onClose=${onClose} />`;

function Code({ run, onClose }) {
  const [language, choose] = useState("curl");
  const [said, say] = useState("");
  const text = useRef();
  const code = recipes(run.job.kind, run.job.request)[language];
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(code);
      say("Copied");
    } catch { // not a secure context: then by hand
      getSelection().selectAllChildren(text.current);
      say("Selected: copy it with the keyboard");
    }
  };
  return html`<${Modal} title="The same as code" onClose=${onClose}>
    <div class="tabs">${["curl", "Python", "JavaScript"].map((name) => html`<button type="button"
      key=${name} aria-pressed=${name === language}
      onClick=${() => { choose(name); say(""); }}>${name}</button>`)}</div>
    <pre ref=${text} tabindex="0" aria-label=${`In ${language}`}>${code}</pre>
    <p class="row"><button type="button" class="go" onClick=${copy}>Copy</button>
      <span role="status">${said}</span></p>
  <//>`;
}

/* Files of a finished run: [words, what to do]. */
export function filesOf(run, index, kind) {
  const { id } = run;
  const from = (path, name) => () => download(`jobs/${id}/${path}`, name);
  const whole = run.status === "succeeded";
  return [
    ...(whole ? [
      ["This image, PNG of 512 px", from(`images/${index}.png?px=512`, `${id}-${index}.png`)],
      ["All of them, one PNG", from("grid.png?px=1024", `${id}.png`)],
      ["All of them as arrays, npz", from("images.zip?format=npy", `${id}.npz`)],
    ] : []),
    ...(run.times.length ? [
      ["The chain as a film, GIF", from(`snapshots.gif?kind=${kind}&px=384`, `${id}.gif`)]] : []),
    ...(run.job?.manifest ? [
      ["Manifest, to make it again", () => saveText(JSON.stringify(run.job.manifest, null, 2),
        `${id}.json`)]] : []),
  ];
}

function saveText(text, name) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  save(url, name);
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/* A button that opens a small menu of actions. */
export function Menu({ words, items, onError }) {
  const act = (does) => async (event) => {
    event.target.closest("details").open = false;
    try { await does(); } catch (error) { onError(error); }
  };
  const away = (event) => {
    const menu = event.currentTarget;
    if (!menu.contains(event.relatedTarget)) menu.open = false;
  };
  const escape = (event) => {
    if (event.key !== "Escape") return;
    event.currentTarget.open = false;
    event.currentTarget.querySelector("summary").focus();
  };
  if (!items.length) return html`<button type="button" class="menu" disabled>${words}</button>`;
  return html`<details class="menu" onFocusOut=${away} onKeyDown=${escape}>
    <summary role="button">${words}</summary>
    <div>${items.map(([name, does]) =>
      html`<button type="button" key=${name} onClick=${act(does)}>${name}</button>`)}</div>
  </details>`;
}

/* The manifest in a file: JSON, or the text chunk `ddpm` of one of our PNGs. Throws Error. */
export async function manifestIn(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const png = bytes[0] === 0x89 && bytes[1] === 0x50;
  const text = png ? chunkOf(bytes) : new TextDecoder().decode(bytes);
  let found;
  try { found = JSON.parse(text); } catch { found = null; }
  if (found === null || typeof found !== "object" || !("model" in found)) {
    throw new Error(`${file.name}: holds no manifest of ours`);
  }
  return found;
}

/* iTXt: keyword, 0, compressed?, method, language, 0, translated keyword, 0, text. */
function chunkOf(bytes) {
  const view = new DataView(bytes.buffer);
  for (let at = 8; at + 8 < bytes.length;) {
    const length = view.getUint32(at);
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (type === "iTXt") {
      const end = data.indexOf(0);
      if (new TextDecoder().decode(data.subarray(0, end)) === "ddpm") {
        const language = data.indexOf(0, end + 3); // past the two flags
        return new TextDecoder().decode(data.subarray(data.indexOf(0, language + 1) + 1));
      }
    }
    at += 12 + length;
  }
  return "";
}
