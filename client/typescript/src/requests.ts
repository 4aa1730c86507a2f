/** Requests in literal form, and the short forms of the common ones. */

import type { DescMethod, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import type { CallOptions } from "./calls.js";
import { Role } from "./gen/lowbit/v1/generation_pb.js";
import { BnbQuantType, FloatType, type Scheme, type SchemeSchema } from "./gen/lowbit/v1/quantization_pb.js";

/** The request of a method in literal form; every field may be missing. */
export type In<M extends DescMethod> = MessageInitShape<M["input"]>;

/** The response of a method. */
export type Out<M extends DescMethod> = MessageShape<M["output"]>;

/** What a short form takes beside the request's main fields: its other fields and the call's options. */
export type Rest<M extends DescMethod, Main extends string> = CallOptions &
  Omit<Exclude<In<M>, MessageShape<M["input"]>>, Main | "$typeName">;

/** One message of a chat. */
export interface ChatTurn {
  readonly role: "system" | "user" | "assistant" | "tool";
  readonly content: string;
}

/** Plain text, or a chat from its oldest message on. */
export type Prompt = string | readonly ChatTurn[];

/** Name of a scheme, with the server's defaults. */
export type SchemeName = "fp32" | "fp16" | "bf16" | "int8" | "nf4" | "fp4" | "gptq" | "awq" | "rtn";

type Kind = NonNullable<Exclude<MessageInitShape<typeof SchemeSchema>, Scheme>["kind"]>;

const SCHEMES: Readonly<Record<SchemeName, Kind>> = {
  fp32: { case: "float", value: { type: FloatType.FP32 } },
  fp16: { case: "float", value: { type: FloatType.FP16 } },
  bf16: { case: "float", value: { type: FloatType.BF16 } },
  int8: { case: "int8", value: {} },
  nf4: { case: "bnb4bit", value: { quantType: BnbQuantType.NF4 } },
  fp4: { case: "bnb4bit", value: { quantType: BnbQuantType.FP4 } },
  gptq: { case: "gptq", value: {} },
  awq: { case: "awq", value: {} },
  rtn: { case: "rtn", value: {} },
};

/** Makes the id of a request, so that a second try is the same job. @internal */
export function newRequestId(): string {
  return crypto.randomUUID().replaceAll("-", "");
}

/** Turns a prompt into the input of a request; throws RangeError for an unknown role. @internal */
export function input(prompt: Prompt) {
  if (typeof prompt === "string") return { case: "text" as const, value: prompt };
  const messages = prompt.map(({ role, content }) => {
    const value = Role[role.toUpperCase() as keyof typeof Role];
    if (!value) throw new RangeError(`unknown role "${role}"; allowed are system, user, assistant and tool`);
    return { role: value, content };
  });
  return { case: "chat" as const, value: { messages } };
}

/** Turns the name of a scheme into what a request takes; throws RangeError for an unknown one. @internal */
export function kindOf(scheme: SchemeName): Kind {
  if (!Object.hasOwn(SCHEMES, scheme))
    throw new RangeError(`unknown scheme "${scheme}"; allowed are ${Object.keys(SCHEMES).join(", ")}`);
  return SCHEMES[scheme];
}
