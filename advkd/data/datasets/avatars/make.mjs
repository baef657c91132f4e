// Renders 4,800 faces of each style, 32x32 RGB, into STYLE.all.raw; the same ones every time.
// npm install @dicebear/{core,pixel-art,open-peeps,lorelei}@9.4.3 @resvg/resvg-js@2.6.2
import fs from 'fs';
import { createAvatar } from '@dicebear/core';
import { Resvg } from '@resvg/resvg-js';

const COUNT = 4800; // more than are taken, since some seeds give the same picture
const SIDE = 32;
const backgroundColor = ['b6e3f4', 'c0aede', 'd1d4f9', 'ffd5dc', 'ffdfbf', 'f2f2f2'];
const hairColor = [
  '2c1b18', '4a312c', '724133', 'a55728', 'b58143', 'd6b370', 'e8e1e1', 'c93305', '3d6b9c', '8c4a9e',
];
const skinColor = ['f2d3b1', 'ecad80', '9e5622', '763900'];
const options = {
  'pixel-art': {},
  'open-peeps': {},
  'lorelei': { hairColor, skinColor }, // black on white by itself
};

for (const [name, own] of Object.entries(options)) {
  const style = await import('@dicebear/' + name);
  const out = Buffer.alloc(COUNT * SIDE * SIDE * 3);
  for (let i = 0; i < COUNT; i++) {
    const seed = `${name}-${i}`;
    const svg = createAvatar(style, { seed, size: SIDE, backgroundColor, ...own }).toString();
    const rgba = new Resvg(svg, { fitTo: { mode: 'width', value: SIDE } }).render().pixels;
    for (let k = 0; k < SIDE * SIDE; k++) {
      for (let c = 0; c < 3; c++) out[(i * SIDE * SIDE + k) * 3 + c] = rgba[k * 4 + c];
    }
  }
  fs.writeFileSync(`${name}.all.raw`, out);
}
