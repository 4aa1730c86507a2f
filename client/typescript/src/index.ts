/** Client of the Lowbit service. */

export type { CallOptions } from "./calls.js";
export * from "./classes.js";
export { Client } from "./client.js";
export * from "./errors.js";
export { type ClientOptions, type TlsOptions } from "./options.js";
export type { ChatTurn, In, Out, Prompt, Rest, SchemeName } from "./requests.js";
export { type Chunk, GenerateStream, LoadStream, Stream } from "./stream.js";
