import io.lowbit.Client;
import io.lowbit.v1.Bnb4BitScheme;
import io.lowbit.v1.BnbQuantType;
import io.lowbit.v1.Scheme;

/** Makes a 4 bit copy and loads it: java -cp ... QuantizeThenLoad.java SOURCE TARGET. */
final class QuantizeThenLoad {
  public static void main(String[] arguments) {
    String source = arguments[0];
    String target = arguments[1];
    var nf4 = Bnb4BitScheme.newBuilder().setQuantType(BnbQuantType.BNB_QUANT_TYPE_NF4);
    var scheme = Scheme.newBuilder().setBnb4Bit(nf4).build();
    try (var client = new Client()) {
      var job = client.quantize(source, target, scheme);
      for (var event : client.watchJob(job.getId())) {
        var progress = event.getJob().getProgress();
        System.out.printf("%s: %d of %d%n", progress.getPhase(), progress.getDone(), progress.getTotal());
      }
      var quality = client.waitJob(job.getId()).getQuality();
      System.out.printf("perplexity %.2f -> %.2f%n", quality.getBasePerplexity(), quality.getPerplexity());
      for (var replica : client.load(target).await()) {
        System.out.printf("live on %s: %d bytes%n", replica.getWorker(), replica.getLiveBytes());
      }
    }
  }
}
