/** gRPC over HTTP/2, for Node. */

import type { ClientHttp2Stream, Http2Session, IncomingHttpHeaders, SecureClientSessionOptions } from "node:http2";
import { connect } from "node:net";
import { fromBinary } from "@bufbuild/protobuf";
import type { Transport } from "@connectrpc/connect";
import { Http2SessionManager, createGrpcTransport } from "@connectrpc/connect-node";
import { StatusSchema } from "./gen/lowbit/status/v1/status_pb.js";
import type { Settled } from "./options.js";

/**
 * Makes a transport that connects with its first call, until it is closed by the signal; throws RangeError for a
 * token in plain text. @internal
 */
export function openTransport(address: string | undefined, options: Settled, closing: AbortSignal): Transport {
  const target = address || process.env["LOWBIT_ADDRESS"] || "127.0.0.1:50151";
  const { tls, token, maxMessageBytes } = options;
  const unix = target.startsWith("unix:") && target.replace(/^unix:(\/\/(?=\/))?/, "");
  if (token !== undefined && !tls && !unix && !/^(127\.|localhost(:|$)|\[::1\])/.test(target))
    throw new RangeError(`token is not sent to ${target} without tls`);
  const url = `${tls ? "https" : "http"}://${unix ? "localhost" : target}`;
  const pings = {
    pingIntervalMs: options.keepaliveInterval * 1000,
    pingTimeoutMs: options.keepaliveTimeout * 1000,
    pingIdleConnection: true,
  };
  const session = new Session(url, pings, {
    // Node counts what waits to be sent or read against this; its own 10 MB would end larger messages.
    maxSessionMemory: 64 + Math.ceil((4 * maxMessageBytes) / 1e6),
    ...(unix && { createConnection: () => connect(unix) }),
    ...(tls && { ca: tls.ca, cert: tls.certificate, key: tls.key }),
    ...(tls?.serverName && { servername: tls.serverName }),
  } as SecureClientSessionOptions);
  closing.addEventListener("abort", () => session.close());
  const limits = { readMaxBytes: maxMessageBytes, writeMaxBytes: maxMessageBytes };
  return createGrpcTransport({ baseUrl: url, sessionManager: session, ...limits });
}

/** A connection that works around what connect-node 2.1.2 gets wrong, and that can be closed in peace. */
class Session extends Http2SessionManager {
  #latest: Http2Session | undefined;

  override async request(...args: Parameters<Http2SessionManager["request"]>): Promise<ClientHttp2Stream> {
    const stream = await super.request(...args);
    // Details that cannot be read must not hide the status.
    for (const event of ["response", "trailers"]) stream.on(event, dropBrokenDetails);
    const { session } = stream;
    if (session && session !== this.#latest) {
      this.#latest = session;
      // A connection that ended with open streams would be pinged once more, and Node throw outside of any call.
      const ping = session.ping.bind(session) as (...args: unknown[]) => boolean;
      session.ping = (...args: unknown[]) => !session.destroyed && ping(...args);
    }
    return stream;
  }

  /** Ends the connection once its streams, all cancelled, have told the server so. */
  close(): void {
    if (this.state() === "connecting") this.abort();
    this.#latest?.close();
  }
}

function dropBrokenDetails(headers: IncomingHttpHeaders): void {
  const details = headers["grpc-status-details-bin"];
  try {
    if (typeof details === "string") fromBinary(StatusSchema, Buffer.from(details, "base64"));
  } catch {
    delete headers["grpc-status-details-bin"];
  }
}
