// A student in WebAssembly: the functions of advkd.h, compiled as advkd.wasm, for JavaScript.
//
//     import { open } from "./advkd.js";
//     const student = await open(library, model); // the bytes of advkd.wasm and of a model file
//     student.describe(); // {size, channels, classes, heads, sizes, classNames}
//     student.generate({ seed: 7n, first: 0, count: 16 }); // {pixels, count, side, channels}

const ERROR_SIZE = 256; // ADVKD_ERROR_SIZE
const INFO_SIZE = 32; // bytes of advkd_info on wasm32
const REQUEST_SIZE = 40; // of advkd_request
const UINT8 = 1; // ADVKD_UINT8
const NOT_HERE = 52; // WASI's ENOSYS: a module in a page has no files and no output

// Opens a model. Rejects with an Error whose message says, as a clause, what is wrong with it.
export async function open(library, model) {
  const module = await WebAssembly.compile(library);
  let memory;
  const instance = await WebAssembly.instantiate(module, imports(module, () => memory));
  memory = instance.exports.memory;
  instance.exports._initialize?.();
  return new Student(instance.exports, model);
}

// What the library asks of its host. It throws no C++ exceptions: what would end in one is handed
// to advkd_refuse, which does not return, and leaves an instance that can only be dropped.
function imports(module, memoryOf) {
  const host = {};
  for (const { module: from, name } of WebAssembly.Module.imports(module)) {
    host[from] ??= {};
    host[from][name] = () => NOT_HERE;
  }
  host.env ??= {};
  host.env.advkd_refuse = (text, length) => {
    throw new Error(decode(new Uint8Array(memoryOf().buffer, text, length)));
  };
  return host;
}

function decode(bytes) {
  return new TextDecoder().decode(bytes);
}

class Student {
  #library; // the exports of advkd.wasm
  #model; // advkd_model *
  #info; // what describe() returns
  #blocks = new Map(); // memory of the library that is kept from call to call, by its purpose

  constructor(library, bytes) {
    this.#library = library;
    const data = this.#block("model", bytes.length);
    const model = this.#block("request", 4);
    const error = this.#block("error", ERROR_SIZE);
    this.#bytes().set(bytes, data);
    const status = library.advkd_open_memory(data, bytes.length, model, error);
    if (status !== 0) throw new Error(this.#text(error));
    this.#model = this.#view().getUint32(model, true);
    this.#free("model");
    this.#info = this.#readInfo();
  }

  // What the model makes. `sizes` are the pixels of a side of each head's images.
  describe() {
    return this.#info;
  }

  #readInfo() {
    const library = this.#library;
    const at = this.#block("info", INFO_SIZE);
    library.advkd_describe(this.#model, at);
    const view = this.#view();
    const [size, channels, classes, heads] = [0, 4, 8, 12].map((offset) =>
      view.getInt32(at + offset, true),
    );
    const numbers = (count) => Array.from({ length: count }, (_, number) => number);
    return {
      size,
      channels,
      classes,
      heads,
      sizes: numbers(heads).map((k) => library.advkd_image_size(this.#model, k + 1)),
      classNames: numbers(classes).map((label) => this.#className(label)),
    };
  }

  // Images number `first` .. `first + count - 1` of a seed (a BigInt), as bytes (count, side, side,
  // channels). `labels`, an array of numbers, are drawn from the seed where they are left out;
  // `exitAt` is the head to leave by, 0 the last.
  generate({ seed, first, count, labels = null, exitAt = 0 }) {
    const library = this.#library;
    const request = this.#request({ seed, first, count, labels, exitAt });
    const { channels } = this.#info;
    const side = library.advkd_image_size(this.#model, exitAt);
    const length = count * side * side * channels;
    const room = library.advkd_workspace_size(this.#model, request);
    const workspace = this.#block("workspace", room);
    const out = this.#block("out", length);
    const status = library.advkd_generate(this.#model, request, workspace, room, out);
    if (status !== 0) throw new Error(this.#text(library.advkd_status_text(status)));
    return { pixels: this.#bytes().slice(out, out + length), count, side, channels };
  }

  // Writes an advkd_request and returns its address.
  #request({ seed, first, count, labels, exitAt }) {
    const at = this.#block("request", REQUEST_SIZE);
    const drawn = labels === null;
    const list = drawn ? 0 : this.#block("labels", 8 * labels.length);
    const view = this.#view();
    view.setBigUint64(at, seed, true);
    view.setBigInt64(at + 8, BigInt(first), true);
    view.setBigInt64(at + 16, BigInt(count), true);
    view.setUint32(at + 24, list, true);
    view.setInt32(at + 28, exitAt, true);
    view.setInt32(at + 32, 0, true); // images of a network pass: the most
    view.setInt32(at + 36, UINT8, true);
    if (!drawn) labels.forEach((label, i) => view.setBigInt64(list + 8 * i, BigInt(label), true));
    return at;
  }

  #className(label) {
    const at = this.#library.advkd_class_name(this.#model, label);
    return at === 0 ? null : this.#text(at);
  }

  // The address of at least `size` bytes for a purpose. What lay there before may be lost.
  #block(purpose, size) {
    const kept = this.#blocks.get(purpose);
    if (kept && kept.size >= size) return kept.at;
    this.#free(purpose);
    const at = this.#library.advkd_allocate(Math.max(size, 1)) >>> 0;
    if (at === 0) throw new Error("there is not enough memory for this model");
    this.#blocks.set(purpose, { at, size });
    return at;
  }

  #free(purpose) {
    const kept = this.#blocks.get(purpose);
    if (kept) this.#library.advkd_free(kept.at);
    this.#blocks.delete(purpose);
  }

  // Views are made anew for each use: growing its memory leaves the earlier ones without any.
  #bytes() {
    return new Uint8Array(this.#library.memory.buffer);
  }

  #view() {
    return new DataView(this.#library.memory.buffer);
  }

  // The text of a char * that ends in 0.
  #text(at) {
    const bytes = this.#bytes();
    return decode(bytes.subarray(at, bytes.indexOf(0, at)));
  }
}
