import io.lowbit.Client;

/** Leaves a stream early; its slot is free at once: java -cp ... examples/Cancel.java MODEL. */
final class Cancel {
  public static void main(String[] arguments) {
    try (var client = new Client()) {
      try (var stream = client.generate(arguments[0], "Once upon a time")) {
        for (int i = 0; i < 5; i++) {
          System.out.print(stream.next());
        }
      } // here the call is cancelled
      System.out.printf("%nleft early%n");
    }
  }
}
