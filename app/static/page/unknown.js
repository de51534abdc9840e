/* What of a picture is not known: brushed over, pixel by pixel of the model. */

import { html, useEffect, useRef } from "./vendor/preact-htm.js";
import { Picture } from "./parts.js";

const BRUSH = 0.09; // radius, of the side
const PAINT = "#f0a37a";

/* Shortcuts, which a keyboard can reach too: boxes [x0, y0, x1, y1] as shares of the sides. */
const PARTS = {
  "Lower half": [0, 0.5, 1, 1],
  "Left half": [0, 0, 0.5, 1],
  "The middle": [0.25, 0.25, 0.75, 0.75],
};

/* A mask is {png: base64, white where unknown, share, shape, paint: as it was brushed}. */
function maskOf(canvas, shape) {
  const { width, height } = canvas;
  const paper = canvas.getContext("2d");
  const paint = paper.getImageData(0, 0, width, height);
  const painted = paper.getImageData(0, 0, width, height);
  let count = 0;
  for (let i = 0; i < width * height; i++) {
    const on = painted.data[4 * i + 3] > 0;
    count += on;
    painted.data.set([on * 255, on * 255, on * 255, 255], 4 * i);
  }
  const copy = Object.assign(document.createElement("canvas"), { width, height });
  copy.getContext("2d").putImageData(painted, 0, 0);
  const src = copy.toDataURL("image/png");
  const png = src.slice(src.indexOf(",") + 1);
  return count ? { png, share: count / (width * height), shape, paint } : null;
}

export function Unknown({ shape, picture, mask, onMask, actions }) {
  const [, height, width] = shape;
  const canvas = useRef();
  const last = useRef(null);
  const paper = () => {
    const found = canvas.current.getContext("2d", { willReadFrequently: true });
    found.fillStyle = PAINT;
    return found;
  };
  useEffect(() => {
    if (mask) paper().putImageData(mask.paint, 0, 0);
    else paper().clearRect(0, 0, width, height);
  }, [mask]);

  const place = (event) => {
    const box = canvas.current.getBoundingClientRect();
    return [((event.clientX - box.left) * width) / box.width,
      ((event.clientY - box.top) * height) / box.height];
  };
  const dab = ([x, y]) => {
    const on = paper();
    const radius = Math.max(0.8, BRUSH * height);
    for (let v = Math.floor(y - radius); v <= y + radius; v++) {
      for (let u = Math.floor(x - radius); u <= x + radius; u++) {
        if (Math.hypot(u + 0.5 - x, v + 0.5 - y) <= radius) on.fillRect(u, v, 1, 1);
      }
    }
  };
  const move = (event) => {
    if (!last.current) return;
    const [from, to] = [last.current, place(event)];
    const dabs = Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1]) * 2) + 1;
    for (let i = 0; i <= dabs; i++) {
      dab([from[0] + ((to[0] - from[0]) * i) / dabs, from[1] + ((to[1] - from[1]) * i) / dabs]);
    }
    last.current = to;
  };
  const begin = (event) => {
    if (event.button !== 0 || !picture) return;
    event.preventDefault();
    canvas.current.setPointerCapture(event.pointerId);
    last.current = place(event);
    move(event);
  };
  const end = () => {
    if (!last.current) return;
    last.current = null;
    onMask(maskOf(canvas.current, shape));
  };
  const part = ([x0, y0, x1, y1]) => () => {
    paper().fillRect(Math.round(x0 * width), Math.round(y0 * height),
      Math.round((x1 - x0) * width), Math.round((y1 - y0) * height));
    onMask(maskOf(canvas.current, shape));
  };
  const share = mask ? `${Math.round(mask.share * 100)} % of it is unknown` : "all of it is known";
  return html`<div class="unknown">
    <div class="over"><${Picture} picture=${picture} alt="The picture to restore" />
      <canvas ref=${canvas} width=${width} height=${height} role="img" id="brush"
        aria-label=${`Brush over what is unknown: ${share}`} onPointerDown=${begin}
        onPointerMove=${move} onPointerUp=${end} onPointerCancel=${end}></canvas></div>
    <div class="parts"><p class="hint" role="status">${picture ? `Brush over what is unknown: ${share}.`
      : "Draw or take a picture first."}</p>
      <p class="row">${Object.entries(PARTS).map(([name, box]) => html`<button type="button"
        key=${name} disabled=${!picture} onClick=${part(box)}>${name}</button>`)}
        <button type="button" disabled=${!mask} onClick=${() => onMask(null)}>Clear the brush</button></p>
      <div class="actions">${actions}</div></div></div>`;
}

/* Beside the fillings: their mean, and where they differ. */
export function Summary({ run }) {
  const { mean, std } = run.job?.urls ?? {};
  if (!mean || run.status !== "succeeded") return null;
  return html`<${Both} key=${run.id} mean=${mean} std=${std} />`;
}

function Both({ mean, std }) {
  const pictures = useRef([{ url: mean }, { url: std }]);
  return html`<div class="summary">
    <figure><${Picture} picture=${pictures.current[0]} alt="The mean of the fillings" />
      <figcaption>Their mean</figcaption></figure>
    <figure><${Picture} picture=${pictures.current[1]} alt="The deviation of the fillings" />
      <figcaption>Where they differ</figcaption></figure></div>`;
}
