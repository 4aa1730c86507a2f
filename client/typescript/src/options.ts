/** What a client may be told about its connection: limits, timeouts and retries. */

import type { Transport } from "@connectrpc/connect";
import { DEFAULTS, type Settings, check } from "./settings.js";

/** Name and version that the server logs. */
export const USER_AGENT = "lowbit-typescript/0.1.0";

/** Certificates, all in PEM. */
export interface TlsOptions {
  /** Authorities to trust; default: those that Node brings along. */
  readonly ca?: string | Uint8Array;
  /** The client's own certificate; with `key` or not at all. */
  readonly certificate?: string | Uint8Array;
  /** The private key of `certificate`. */
  readonly key?: string | Uint8Array;
  /** Name that the server's certificate must have, in place of the address's. */
  readonly serverName?: string;
}

/** Options of one client; all times are in seconds. */
export interface ClientOptions extends Settings {
  /** Makes the connection TLS. Default: plain text. */
  readonly tls?: TlsOptions | undefined;
  /** Sent as `authorization: Bearer TOKEN`; without TLS only to loopback. */
  readonly token?: string | undefined;
  /** Called for each try; returns a W3C `traceparent` or nothing. */
  readonly traceparent?: (() => string | undefined) | undefined;
  /** Carries the calls in place of gRPC over HTTP/2, such as gRPC-Web; address, TLS and keepalive are then its own. */
  readonly transport?: Transport | undefined;
}

/** Options with every default filled in. @internal */
export type Settled = ClientOptions & typeof DEFAULTS;

const TOKEN = /^[A-Za-z0-9._~+/-]+=*$/; // RFC 6750, section 2.1

/** Fills in the defaults; throws RangeError, with the option's name, where a value makes no sense. @internal */
export function settle(options: ClientOptions): Settled {
  const given = Object.entries(options).filter(([, value]) => value !== undefined);
  const settled: Settled = { ...DEFAULTS, ...Object.fromEntries(given) };
  check(settled);
  if (!settled.tls?.certificate !== !settled.tls?.key) throw new RangeError("tls.certificate and tls.key go together");
  if (settled.token !== undefined && !TOKEN.test(settled.token))
    throw new RangeError("token has other characters than RFC 6750 allows, or none");
  return settled;
}
