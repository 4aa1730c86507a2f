import io.lowbit.Client;
import io.lowbit.v1.ChatMessage;
import io.lowbit.v1.GenerateRequest;
import io.lowbit.v1.Role;

/** Streams a chat answer: java -cp ... examples/Chat.java MODEL "question". */
final class Chat {
  public static void main(String[] arguments) {
    var request = GenerateRequest.newBuilder().setModel(arguments[0]);
    request
        .getChatBuilder()
        .addMessages(ChatMessage.newBuilder().setRole(Role.ROLE_USER).setContent(arguments[1]));
    request.getStoppingBuilder().setMaxTokens(200);
    request.getSamplingBuilder().setTemperature(0.7f).setSeed(1);
    try (var client = new Client();
        var answer = client.generate(request.build())) {
      for (var chunk : answer) {
        System.out.print(chunk);
      }
      var usage = answer.completed().orElseThrow().getUsage();
      System.out.printf("%n%d tokens%n", usage.getOutputTokens());
    }
  }
}
