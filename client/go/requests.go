package lowbit

import (
	"crypto/rand"
	"encoding/hex"

	"google.golang.org/protobuf/proto"

	pb "lowbit/gen/lowbitv1"
)

// GenerateText asks for what follows a prompt.
func GenerateText(model, prompt string) *pb.GenerateRequest {
	return &pb.GenerateRequest{Model: model, Input: &pb.GenerateRequest_Text{Text: prompt}}
}

// GenerateChat asks for the next message of a chat; System, User and Assistant make messages.
func GenerateChat(model string, messages ...*pb.ChatMessage) *pb.GenerateRequest {
	return &pb.GenerateRequest{Model: model, Input: &pb.GenerateRequest_Chat{Chat: &pb.Chat{Messages: messages}}}
}

// System is a chat message with instructions to the model.
func System(content string) *pb.ChatMessage {
	return &pb.ChatMessage{Role: pb.Role_ROLE_SYSTEM, Content: content}
}

// User is a chat message of the person or program that asks.
func User(content string) *pb.ChatMessage {
	return &pb.ChatMessage{Role: pb.Role_ROLE_USER, Content: content}
}

// Assistant is a chat message of the model.
func Assistant(content string) *pb.ChatMessage {
	return &pb.ChatMessage{Role: pb.Role_ROLE_ASSISTANT, Content: content}
}

// TokenizeText asks for the token ids of a text.
func TokenizeText(model, text string) *pb.TokenizeRequest {
	return &pb.TokenizeRequest{Model: model, Input: &pb.TokenizeRequest_Text{Text: text}}
}

// ImportPath asks to import a folder or GGUF file of the server under a name.
func ImportPath(model, path string) *pb.ImportModelRequest {
	return &pb.ImportModelRequest{Model: model, Source: &pb.ModelSource{Kind: &pb.ModelSource_Path{Path: path}}}
}

// LoadModel asks to load a model onto the device with most free memory.
func LoadModel(model string) *pb.LoadRequest { return &pb.LoadRequest{Model: model} }

// QuantizeTo asks for a copy of source under the name target, with a scheme of Scheme.
func QuantizeTo(source, target, scheme string) *pb.QuantizeRequest {
	return &pb.QuantizeRequest{Source: source, Target: target, Scheme: Scheme(scheme)}
}

var schemes = map[string]*pb.Scheme{
	"fp32": {Kind: &pb.Scheme_Float{Float: &pb.FloatScheme{Type: pb.FloatType_FLOAT_TYPE_FP32}}},
	"fp16": {Kind: &pb.Scheme_Float{Float: &pb.FloatScheme{Type: pb.FloatType_FLOAT_TYPE_FP16}}},
	"bf16": {Kind: &pb.Scheme_Float{Float: &pb.FloatScheme{Type: pb.FloatType_FLOAT_TYPE_BF16}}},
	"int8": {Kind: &pb.Scheme_Int8{Int8: &pb.Int8Scheme{}}},
	"nf4":  {Kind: &pb.Scheme_Bnb_4Bit{Bnb_4Bit: &pb.Bnb4BitScheme{QuantType: pb.BnbQuantType_BNB_QUANT_TYPE_NF4}}},
	"fp4":  {Kind: &pb.Scheme_Bnb_4Bit{Bnb_4Bit: &pb.Bnb4BitScheme{QuantType: pb.BnbQuantType_BNB_QUANT_TYPE_FP4}}},
	"gptq": {Kind: &pb.Scheme_Gptq{Gptq: &pb.GptqScheme{}}},
	"awq":  {Kind: &pb.Scheme_Awq{Awq: &pb.AwqScheme{}}},
	"rtn":  {Kind: &pb.Scheme_Rtn{Rtn: &pb.RtnScheme{}}},
}

// Scheme returns the scheme of a name with its default options: fp32, fp16, bf16, int8, nf4,
// fp4, gptq, awq or rtn. For another name it is nil, which the server refuses.
func Scheme(name string) *pb.Scheme { return proto.CloneOf(schemes[name]) }

// newRequestID returns 32 hexadecimal digits.
func newRequestID() string {
	id := make([]byte, 16)
	rand.Read(id) // which never fails
	return hex.EncodeToString(id)
}
