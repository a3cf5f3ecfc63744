// Runs modules that arrive as lines of JSON, one after the other; for each prints whether it threw, and its output.
import { createInterface } from 'node:readline';

const write = process.stdout.write.bind(process.stdout);
let number = 0;
for await (const line of createInterface({ input: process.stdin })) {
  let output = '', error = '';
  process.stdout.write = (piece) => { output += Buffer.from(piece); return true; };
  try {
    // A module is run only at its first import, so each is made unique.
    number += 1;
    await import(`data:text/javascript,${encodeURIComponent(`${JSON.parse(line)}\n// ${number}`)}`);
  } catch (thrown) {
    error = String(thrown);
  }
  process.stdout.write = write;
  write(`${JSON.stringify([error ? 1 : 0, output, error])}\n`);
}
