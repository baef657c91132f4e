// node wasm_images.mjs LIBRARY MODEL OUT REQUEST...: images of a model by a build of advkd.wasm, as
// float32 one after another in OUT. A request is SEED,FIRST,COUNT,EXIT_AT.
import { readFileSync, writeFileSync } from "node:fs";

const [library, model, out, ...requests] = process.argv.slice(2);
const module = new WebAssembly.Module(readFileSync(library));
const host = {};
for (const { module: from, name } of WebAssembly.Module.imports(module)) {
  host[from] ??= {};
  host[from][name] = () => 52;
}
host.env.advkd_refuse = (text, length) => {
  throw new Error(Buffer.from(c.memory.buffer, text, length).toString());
};
const c = new WebAssembly.Instance(module, host).exports;
c._initialize();

const view = () => new DataView(c.memory.buffer);
const content = readFileSync(model);
const data = c.advkd_allocate(content.length);
new Uint8Array(c.memory.buffer).set(content, data);
const [at, info, request] = [4, 32, 40].map((size) => c.advkd_allocate(size));
if (c.advkd_open_memory(data, content.length, at, 0) !== 0) throw new Error("it does not open");
const opened = view().getUint32(at, true);
c.advkd_describe(opened, info);
const channels = view().getInt32(info + 4, true);

const images = requests.map((text) => {
  const [seed, first, count, exitAt] = text.split(",").map(BigInt);
  const fields = view();
  [seed, first, count, 0n, 0n].forEach((n, i) => fields.setBigUint64(request + 8 * i, n, true));
  fields.setInt32(request + 28, Number(exitAt), true);
  const size = c.advkd_workspace_size(opened, request);
  const length = 4 * Number(count) * c.advkd_image_size(opened, Number(exitAt)) ** 2 * channels;
  const [workspace, to] = [c.advkd_allocate(size), c.advkd_allocate(length)];
  const status = c.advkd_generate(opened, request, workspace, size, to);
  if (status !== 0) throw new Error(`status ${status}`);
  const made = Buffer.from(c.memory.buffer.slice(to, to + length));
  [workspace, to].forEach((memory) => c.advkd_free(memory));
  return made;
});
writeFileSync(out, Buffer.concat(images));
