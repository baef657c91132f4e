// The page's side of "Try it": asks the worker for images, row by row, and draws them as they come.

const MOST_COLUMNS = 8; // as in the grid of `advkd sample`, which makes 64 images
const WIDEST = 512; // pixels of a row of images: large images are fewer
const TILE = 64; // pixels: in the PNG, small images are enlarged by a whole factor up to this side
const LAST_SEED = 2n ** 64n - 1n;

const TOO_OLD =
  "This browser cannot run the model: that takes WebAssembly with SIMD, and Chrome or Edge from " +
  "version 97, Firefox from 113 or Safari from 16.4.";
// A WebAssembly module of one function, which uses SIMD.
const SIMD = Uint8Array.of(
  ...[0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0],
  ...[253, 15, 253, 98, 11],
);

const part = (name) => document.getElementById(`try-${name}`);
const outer = part("it");
const canvas = part("grid");
const pen = canvas.getContext("2d");
const calm = matchMedia("(prefers-reduced-motion: reduce)");

let info; // what the model makes, as the worker describes it
let columns; // of the grid, and its rows
let latest = 0; // number of the newest request: older ones end after the row they are at
let inWork = Promise.resolve(); // the row that the worker is at

// The worker.

const worker = new Worker(URL.createObjectURL(new Blob([part("worker").textContent])));
const waiting = []; // who gets the worker's next answers, in order

worker.onmessage = ({ data }) => {
  const { resolve, reject } = waiting.shift();
  if (data.error === undefined) resolve(data.result);
  else reject(new Error(data.error));
};

worker.onerror = () => fail(new Error("This browser does not run the page's worker."));

function ask(task, request) {
  return new Promise((resolve, reject) => {
    waiting.push({ resolve, reject });
    worker.postMessage({ task, ...request });
  });
}

// What the reader has chosen.

function chosenSeed() {
  const text = part("seed").value.trim();
  const seed = /^\d{1,20}$/.test(text) ? BigInt(text) : -1n;
  const valid = seed >= 0n && seed <= LAST_SEED;
  part("seed").setAttribute("aria-invalid", String(!valid));
  if (!valid) say(`A seed is a whole number from 0 to ${LAST_SEED}.`);
  return valid ? seed : null;
}

function chosenLabel() {
  const value = part("class").value;
  return value === "" ? null : Number(value);
}

function chosenHead() {
  return Number(part("head").value);
}

// Generating.

async function generate() {
  const mine = ++latest;
  const seed = chosenSeed();
  if (seed === null) return;
  describeChoice(seed);
  const label = chosenLabel();
  const labels = label === null ? null : Array(columns).fill(label);
  const request = { seed, labels, count: columns, exitAt: chosenHead() };
  try {
    await fill(request, () => mine !== latest);
  } catch (error) {
    fail(error);
  }
}

// Generates a whole grid and draws it, until a newer request makes it stale.
async function fill(request, isStale) {
  const rows = [];
  let milliseconds = 0;
  for (let row = 0; row < columns; row++) {
    await inWork;
    if (isStale()) return;
    inWork = ask("generate", { ...request, first: row * columns });
    const images = await inWork;
    if (isStale()) return;
    milliseconds += images.milliseconds;
    part("ms").textContent = brief(milliseconds / ((row + 1) * columns));
    rows.push(images);
    if (!calm.matches) draw(images, row);
  }
  if (calm.matches) rows.forEach(draw);
  finish(request, milliseconds / columns ** 2);
}

function finish({ seed, exitAt }, milliseconds) {
  const side = info.sizes[exitAt - 1];
  const images = `${columns ** 2} images of seed ${seed}`;
  const what = [images, ...className(), `${side}×${side} pixels`].join(", ");
  canvas.setAttribute("aria-label", `A grid of ${what}`);
  part("save").disabled = false;
  say(`${what}, ${brief(milliseconds)}\u00a0ms each.`);
}

function brief(milliseconds) {
  return milliseconds < 100 ? milliseconds.toPrecision(2) : milliseconds.toFixed(0);
}

// Drawing.

// Draws a row of images at the size of the last head's: what an earlier head makes is enlarged.
function draw(images, row) {
  const { side, count } = images;
  const strip = new OffscreenCanvas(count * side, side);
  strip.getContext("2d").putImageData(new ImageData(rgba(images), count * side, side), 0, 0);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(strip, 0, row * info.size, canvas.width, info.size);
}

// The pixels of images (count, side, side, channels) side by side, with an alpha of 255.
function rgba({ pixels, side, count, channels }) {
  const out = new Uint8ClampedArray((4 * pixels.length) / channels).fill(255);
  const step = channels === 1 ? 0 : 1; // grey is the same in red, green and blue
  let from = 0;
  for (let image = 0; image < count; image++) {
    for (let y = 0; y < side; y++) {
      let to = 4 * side * (y * count + image);
      for (let x = 0; x < side; x++, from += channels, to += 4) {
        out[to] = pixels[from];
        out[to + 1] = pixels[from + step];
        out[to + 2] = pixels[from + 2 * step];
      }
    }
  }
  return out;
}

// Enlarges the grid to the room that it has, by a whole number of the screen's pixels.
function fit() {
  const room = canvas.parentElement.clientWidth * devicePixelRatio;
  const factor = Math.max(1, Math.floor(room / canvas.width));
  canvas.style.width = `${(factor * canvas.width) / devicePixelRatio}px`;
}

// The same sheet as `advkd sample` writes.
function save() {
  const factor = Math.max(1, Math.floor(TILE / info.size));
  const sheet = document.createElement("canvas");
  sheet.width = sheet.height = factor * canvas.width;
  const pen = sheet.getContext("2d");
  pen.imageSmoothingEnabled = false;
  pen.drawImage(canvas, 0, 0, sheet.width, sheet.height);
  sheet.toBlob((png) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(png);
    link.download = `seed-${part("seed").value.trim()}.png`;
    link.click();
    // The browser may read it a little later than the click.
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  });
}

// Words.

// Of which class the images are, in a list: an empty one for a model without classes.
function className() {
  const label = chosenLabel();
  if (label === null) return info.classes > 0 ? ["all classes"] : [];
  return [info.classNames[label] ?? `class ${label}`];
}

// Shows what belongs to the choice before its images are there.
function describeChoice(seed) {
  const head = chosenHead();
  const side = info.sizes[head - 1];
  part("of").textContent = `head ${head} of ${info.heads}, ${side}×${side} pixels`;
  part("head").setAttribute("aria-valuetext", part("of").textContent);
  part("command").textContent = command(seed, chosenLabel(), head);
}

// The command that makes the same images.
function command(seed, label, head) {
  const words = [part("command").dataset.command, `--seed ${seed}`];
  if (columns !== MOST_COLUMNS) words.push(`--num ${columns ** 2}`);
  if (label !== null) {
    const name = info.classNames[label] ?? "";
    words.push(`--class ${/^\w[\w./-]*$/.test(name) ? name : label}`);
  }
  if (head !== info.heads) words.push(`--exit-at ${head}`);
  return words.join(" ");
}

function say(text) {
  part("status").textContent = text;
}

// After an error nothing more can be generated: a sentence that says why is all that stays.
function fail(error) {
  latest++;
  outer.classList.add("failed");
  say(error.message);
}

// Beginning.

function offerChoices() {
  info.classNames.forEach((name, label) => {
    part("class").add(new Option(name ?? `class ${label}`, label));
  });
  part("classes").hidden = info.classes === 0;
  part("head").max = info.heads;
  part("head").value = info.heads;
  part("heads").hidden = info.heads === 1;
  outer.querySelectorAll("input, select, #try-next").forEach((control) => {
    control.disabled = false;
  });
}

function listen() {
  part("seed").addEventListener("input", generate);
  part("class").addEventListener("change", generate);
  part("head").addEventListener("input", generate);
  part("save").addEventListener("click", save);
  part("next").addEventListener("click", () => {
    const seed = chosenSeed();
    part("seed").value = seed === null || seed === LAST_SEED ? 0n : seed + 1n;
    generate();
  });
}

function isSupported() {
  const needed = ["WebAssembly", "DecompressionStream", "OffscreenCanvas"];
  return needed.every((name) => name in globalThis) && WebAssembly.validate(SIMD);
}

async function begin() {
  try {
    if (!isSupported()) throw new Error(TOO_OLD);
    const [library, model] = ["library", "model"].map((name) => part(name).textContent);
    info = await ask("open", { library, model });
  } catch (error) {
    fail(error);
    return;
  }
  columns = Math.min(MOST_COLUMNS, Math.max(2, Math.floor(WIDEST / info.size)));
  canvas.width = canvas.height = columns * info.size;
  new ResizeObserver(fit).observe(canvas.parentElement);
  offerChoices();
  listen();
  generate();
}

begin();
