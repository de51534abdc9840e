/* Where a picture comes from: drawn here, dropped, opened, or made earlier. */

import { html, useEffect, useRef, useState } from "./vendor/preact-htm.js";
import { history } from "./history.js";
import { useObservable } from "./observable.js";
import { Picture } from "./parts.js";
import { blank, pictureAt, pictureFrom, pictureOf, pictureOn } from "./pictures.js";
import { useRecorded } from "./recorded.js";

const SIDE = 320;
const PEN = 2.4 / 32; // of the side: as thick as the strokes of handwritten digits
const RECENT = 6;

/* A canvas to draw on, with the picture below; `onPicture` after each stroke. */
export function Pad({ shape, picture, onPicture, label }) {
  const canvas = useRef();
  const stroke = useRef(null);
  const drawn = useRef(null); // the last picture that came from here
  const [colour, setColour] = useState("#ffffff");
  useEffect(() => { // what came from elsewhere is drawn on too
    if (picture && picture === drawn.current) return undefined;
    const paper = canvas.current.getContext("2d");
    paper.fillStyle = "#000";
    paper.fillRect(0, 0, SIDE, SIDE);
    if (!picture) return undefined;
    const image = new Image();
    image.onload = () => {
      paper.imageSmoothingEnabled = false;
      paper.drawImage(image, 0, 0, SIDE, SIDE);
    };
    image.src = picture.src;
    return () => { image.onload = null; };
  }, [picture]);

  const place = (event) => {
    const box = canvas.current.getBoundingClientRect();
    return [((event.clientX - box.left) * SIDE) / box.width,
      ((event.clientY - box.top) * SIDE) / box.height];
  };
  const begin = (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    canvas.current.setPointerCapture(event.pointerId);
    stroke.current = place(event);
    draw(event);
  };
  const draw = (event) => {
    if (!stroke.current) return;
    const paper = canvas.current.getContext("2d");
    const to = place(event);
    Object.assign(paper, {
      strokeStyle: colour, lineWidth: PEN * SIDE, lineCap: "round", lineJoin: "round" });
    paper.beginPath();
    paper.moveTo(...stroke.current);
    paper.lineTo(...to);
    paper.stroke();
    stroke.current = to;
  };
  const end = () => {
    if (!stroke.current) return;
    stroke.current = null;
    const small = blank(shape);
    small.imageSmoothingQuality = "high";
    small.drawImage(canvas.current, 0, 0, shape[2], shape[1]);
    drawn.current = pictureOn(small, shape, "your drawing");
    onPicture(drawn.current);
  };
  return html`<div class="pad">
    <canvas ref=${canvas} width=${SIDE} height=${SIDE} role="img"
      aria-label=${`${label}: ${picture ? picture.name : "nothing yet"}. Draw with a finger or the mouse.`}
      onPointerDown=${begin} onPointerMove=${draw} onPointerUp=${end} onPointerCancel=${end}></canvas>
    ${!picture && html`<span class="invitation" aria-hidden="true">draw here</span>`}
    ${shape[0] === 3 && html`<label>Pen <input type="color" value=${colour}
      onInput=${(event) => setColour(event.target.value)} /></label>`}
  </div>`;
}

/* Pictures that this browser made, to take one of. */
function Recent({ model, onComing }) {
  const { shape } = model;
  const recorded = useRecorded(model);
  useObservable(history);
  const made = history.all.filter(({ kind, done }) =>
    done && kind !== "noise" && kind !== "likelihood");
  if (!made.length && !recorded) return null;
  const take = (job) =>
    onComing(pictureAt(`jobs/${job.id}/images/0.png`, shape, `${job.title}, the first`));
  return html`<div class="recent" role="group" aria-label="Take a picture made earlier">
    ${made.slice(0, RECENT).map((job) => html`<button type="button" key=${job.id}
      aria-label=${`Take the first of ${job.title}`} onClick=${() => take(job)}>
      <${Thumbnail} id=${job.id} /></button>`)}
    ${recorded?.images.slice(0, Math.max(0, RECENT - made.length)).map(({ src }, i) => html`<button
      type="button" key=${src} aria-label=${`Take example ${i + 1}`}
      onClick=${() => onComing(pictureFrom(src, shape, `example ${i + 1}`))}>
      <${Picture} picture=${recorded.images[i]} alt="" /></button>`)}</div>`;
}

function Thumbnail({ id }) {
  const [picture] = useState({ url: `jobs/${id}/images/0.png` });
  return html`<${Picture} picture=${picture} alt="" onGone=${() => history.finish(id, false)} />`;
}

/* All ways to a picture. onPicture: told of one, or null; onComing: of the Promise of one. */
export function Source({ model, picture, onPicture, onComing, label = "Your picture" }) {
  const { shape } = model;
  const [over, setOver] = useState(false);
  const open = (file) => file && onComing(pictureOf(file, shape, file.name));
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    open(event.dataTransfer.files[0]);
  };
  return html`<div class=${`source ${over ? "over" : ""}`} onDrop=${drop}
    onDragOver=${(event) => { event.preventDefault(); setOver(true); }}
    onDragLeave=${() => setOver(false)}>
    <${Pad} shape=${shape} picture=${picture} onPicture=${onPicture} label=${label} />
    <p class="row"><button type="button" disabled=${!picture} onClick=${() => onPicture(null)}>Clear</button>
      <label class="file">Open or drop a file
        <input type="file" accept="image/*" onChange=${(event) => {
          open(event.target.files[0]);
          event.target.value = "";
        }} /></label></p>
    <${Recent} model=${model} onComing=${onComing} />
  </div>`;
}
