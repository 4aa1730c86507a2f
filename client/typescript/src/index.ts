/** Client of the Lowbit service. */

export type { CallOptions } from "./calls.js";
export { type ChatTurn, Client, type In, type Out, type Prompt, type Rest, type SchemeName } from "./client.js";
export * from "./errors.js";
export { type ClientOptions, type TlsOptions } from "./options.js";
export { type Chunk, GenerateStream, LoadStream, Stream } from "./stream.js";
