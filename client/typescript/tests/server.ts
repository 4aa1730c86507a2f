/** A real server with scripted models, for tests. */

import { spawn } from "node:child_process";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

/** The repository; this file runs from client/typescript/dist/tests. */
export const ROOT = fileURLToPath(new URL("../../../../", import.meta.url));

/** The SDK's folder. */
export const SDK = `${ROOT}client/typescript/`;

/** A server that runs until `stop`. */
export interface Server {
  readonly address: string;
  stop(): Promise<void>;
}

/** Starts a server with models of the scripted engine, each loaded under its name. */
export async function startServer(models: Record<string, object>): Promise<Server> {
  const scripts = Object.entries(models).map(([name, script]) => `${name}=${JSON.stringify(script)}`);
  const child = spawn(`${ROOT}.venv/bin/python`, ["-m", "tests.conformance.serve", ...scripts], {
    cwd: ROOT,
    stdio: ["pipe", "pipe", "inherit"],
  });
  const ended = new Promise<void>((resolve) => child.on("close", () => resolve()));
  const { value: address } = await createInterface(child.stdout)[Symbol.asyncIterator]().next();
  if (!address) throw new Error("the server did not start");
  const stop = () => {
    child.stdin.end();
    return ended;
  };
  return { address, stop };
}

/** Waits until a condition holds; fails after 20 s. */
export async function until(condition: () => boolean | Promise<boolean>): Promise<void> {
  const deadline = performance.now() + 20_000;
  while (!(await condition())) {
    if (performance.now() > deadline) throw new Error("the condition did not come");
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}
