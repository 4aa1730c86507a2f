package lowbit

import (
	"crypto/rand"
	"encoding/hex"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

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

// Scheme returns the scheme of a name with its default options: fp32, fp16, bf16, int8, nf4,
// fp4, gptq, awq or rtn. For another name it is nil, which the server refuses.
func Scheme(name string) *pb.Scheme {
	switch name {
	case "int8":
		return &pb.Scheme{Kind: &pb.Scheme_Int8{Int8: &pb.Int8Scheme{}}}
	case "nf4":
		return &pb.Scheme{Kind: &pb.Scheme_Bnb_4Bit{Bnb_4Bit: &pb.Bnb4BitScheme{QuantType: pb.BnbQuantType_BNB_QUANT_TYPE_NF4}}}
	case "fp4":
		return &pb.Scheme{Kind: &pb.Scheme_Bnb_4Bit{Bnb_4Bit: &pb.Bnb4BitScheme{QuantType: pb.BnbQuantType_BNB_QUANT_TYPE_FP4}}}
	case "gptq":
		return &pb.Scheme{Kind: &pb.Scheme_Gptq{Gptq: &pb.GptqScheme{}}}
	case "awq":
		return &pb.Scheme{Kind: &pb.Scheme_Awq{Awq: &pb.AwqScheme{}}}
	case "rtn":
		return &pb.Scheme{Kind: &pb.Scheme_Rtn{Rtn: &pb.RtnScheme{}}}
	}
	types := map[string]pb.FloatType{"fp32": pb.FloatType_FLOAT_TYPE_FP32, "fp16": pb.FloatType_FLOAT_TYPE_FP16, "bf16": pb.FloatType_FLOAT_TYPE_BF16}
	if kind, ok := types[name]; ok {
		return &pb.Scheme{Kind: &pb.Scheme_Float{Float: &pb.FloatScheme{Type: kind}}}
	}
	return nil
}

// named returns the request with a request_id, unless it has one or only asks to validate.
func named[Q interface {
	proto.Message
	GetRequestId() string
}](request Q) Q {
	asks, ok := any(request).(interface{ GetValidateOnly() bool })
	if request.GetRequestId() != "" || ok && asks.GetValidateOnly() {
		return request
	}
	id := make([]byte, 16)
	rand.Read(id) // which never fails
	request = proto.CloneOf(request)
	message := request.ProtoReflect()
	message.Set(message.Descriptor().Fields().ByName("request_id"), protoreflect.ValueOfString(hex.EncodeToString(id)))
	return request
}
