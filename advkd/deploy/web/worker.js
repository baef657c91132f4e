"use strict";
// The worker of the page: opens the model, then generates as it is asked. advkd.js stands below.
// Every message has an answer, in order: {result}, or {error} with a sentence for the reader.

let student = null;

const tasks = {
  async open({ library, model }) {
    student = await open(await unpack(library), await unpack(model));
    return student.describe();
  },

  generate(request) {
    const began = performance.now();
    const images = student.generate(request);
    return { ...images, milliseconds: performance.now() - began };
  },
};

// What precedes an error's text, which is a clause.
const failures = {
  open: "The model in this page cannot be used",
  generate: "The model has stopped",
};

// The bytes that stand in the page as base64 of gzip, whose checksum tells damage.
async function unpack(text) {
  try {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    throw new Error("the page is damaged, and has to be copied or exported again");
  }
}

onmessage = async ({ data: { task, ...request } }) => {
  try {
    postMessage({ result: await tasks[task](request) });
  } catch (error) {
    postMessage({ error: `${failures[task]}: ${error.message}.` });
  }
};
