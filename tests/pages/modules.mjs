// Runs the modules that come as lines of JSON, one after the other, and says of each whether it threw and what it said.
import { createInterface } from 'node:readline';

const write = process.stdout.write.bind(process.stdout);
let number = 0;
for await (const line of createInterface({ input: process.stdin })) {
  let said = '', wrong = '';
  process.stdout.write = (piece) => { said += Buffer.from(piece); return true; };
  try {
    // What was imported once is not run again: no two are the same.
    number += 1;
    await import(`data:text/javascript,${encodeURIComponent(`${JSON.parse(line)}\n// ${number}`)}`);
  } catch (error) {
    wrong = String(error);
  }
  process.stdout.write = write;
  write(`${JSON.stringify([wrong ? 1 : 0, said, wrong])}\n`);
}
