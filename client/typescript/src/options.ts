/** What a client may be told about its connection: limits, timeouts and retries. */

import type { Transport } from "@connectrpc/connect";

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
export interface ClientOptions {
  /** Deadline of a call with one answer, over all tries. Default 30. */
  readonly callTimeout?: number;
  /** The same for `verifyModel` and `score`. Default 600. */
  readonly slowCallTimeout?: number;
  /** Deadline of `generate` and `load`. Default: none. */
  readonly streamTimeout?: number | undefined;
  /** How long `watchJob` and `load` try to get back to a server. Default 60. */
  readonly resumeTimeout?: number;
  /** Largest message that is sent or accepted. Default 64 MiB. */
  readonly maxMessageBytes?: number;
  /** Time between two pings of the connection; the server allows one every 10 s. Default 30. */
  readonly keepaliveInterval?: number;
  /** A connection whose ping is not answered in this time is given up. Default 10. */
  readonly keepaliveTimeout?: number;
  /** Tries of one call in all; 1 switches retries off. Default 4. */
  readonly maxAttempts?: number;
  /** Wait before the second try where the server names none; doubles each time. Default 0.1. */
  readonly firstBackoff?: number;
  /** Longest wait between two tries where the server names none. Default 2. */
  readonly maxBackoff?: number;
  /** Retries in a row over all calls; each success gives back 0.1. Default 20. */
  readonly retryBudget?: number;
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
export type Settled = ClientOptions &
  Required<Omit<ClientOptions, "streamTimeout" | "tls" | "token" | "traceparent" | "transport">>;

const DEFAULTS = {
  callTimeout: 30,
  slowCallTimeout: 600,
  resumeTimeout: 60,
  maxMessageBytes: 64 * 1024 * 1024,
  keepaliveInterval: 30,
  keepaliveTimeout: 10,
  maxAttempts: 4,
  firstBackoff: 0.1,
  maxBackoff: 2,
  retryBudget: 20,
};

const TOKEN = /^[A-Za-z0-9._~+/-]+=*$/; // RFC 6750, section 2.1
const WHOLE = ["maxMessageBytes", "maxAttempts", "retryBudget"];

/** Fills in the defaults; throws RangeError, with the option's name, where a value makes no sense. @internal */
export function settle(options: ClientOptions): Settled {
  const given = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
  const settled: Settled = { ...DEFAULTS, ...given };
  for (const name of [...Object.keys(DEFAULTS), "streamTimeout"]) {
    const value: unknown = settled[name as keyof Settled];
    if (value === undefined && name === "streamTimeout") continue;
    const least = name === "retryBudget" ? 0 : WHOLE.includes(name) ? 1 : Number.MIN_VALUE;
    if (typeof value !== "number" || !(value >= least) || (WHOLE.includes(name) && !Number.isInteger(value)))
      throw new RangeError(
        `${name} must be ${WHOLE.includes(name) ? `a whole number of at least ${least}` : "above 0"}`,
      );
  }
  if (!settled.tls?.certificate !== !settled.tls?.key) throw new RangeError("tls.certificate and tls.key go together");
  if (settled.token !== undefined && !TOKEN.test(settled.token))
    throw new RangeError("token has other characters than RFC 6750 allows, or none");
  return settled;
}
