import io.lowbit.Client;
import io.lowbit.Errors.InvalidArgumentException;
import io.lowbit.Errors.ModelNotFoundException;
import io.lowbit.LowbitException;
import io.lowbit.v1.GenerateRequest;
import io.lowbit.v1.Sampling;

/** What goes wrong has a class and a reason: java -cp ... examples/Errors.java. */
final class Errors {
  public static void main(String[] arguments) {
    try (var client = new Client()) {
      try {
        client.generate("no-such-model", "hello").text();
      } catch (ModelNotFoundException error) {
        System.out.println(error);
      }
      var sampling = Sampling.newBuilder().setTemperature(-1).setTopP(2);
      var request = GenerateRequest.newBuilder().setModel("m").setText("hello").setSampling(sampling);
      try {
        client.generate(request.build()).text();
      } catch (InvalidArgumentException error) {
        error.violations().forEach(one -> System.out.println(one.getField() + ": " + one.getDescription()));
      }
      try {
        client.load("no-such-model").await();
      } catch (LowbitException error) {
        System.out.println(error.code() + ": " + error.reason());
      }
    }
  }
}
