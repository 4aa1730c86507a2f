/** In place of transport.ts where there is no HTTP/2 API. */

/** Throws: browsers have no gRPC; they give the client a transport such as gRPC-Web. @internal */
export function openTransport(): never {
  throw new RangeError("transport must be given here, such as that of @connectrpc/connect-web");
}
