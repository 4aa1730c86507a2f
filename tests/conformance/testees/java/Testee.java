import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonNull;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.protobuf.MessageOrBuilder;
import com.google.protobuf.util.JsonFormat;
import io.lowbit.Chunk;
import io.lowbit.Client;
import io.lowbit.GenerateStream;
import io.lowbit.LowbitException;
import io.lowbit.MessageStream;
import io.lowbit.Options;
import io.lowbit.v1.*;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.HashMap;
import java.util.Iterator;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.Set;
import java.util.TreeSet;
import java.util.function.BiFunction;
import java.util.stream.Stream;

/** The testee of the Java SDK; tests/conformance/README.md has its protocol. */
final class Testee {
  private static final PrintStream OUT = new PrintStream(System.out, false, StandardCharsets.UTF_8);
  private static final Set<String> KEYS =
      Set.of("id", "target", "verb", "request", "options", "timeout_s", "cancel_after", "drop_after");
  private static final Map<String, Verb<?>> VERBS = new HashMap<>();

  /** What a verb takes, and how it is called; the result is a stream, an iterable or a message. */
  private record Verb<Q extends Message>(Q empty, BiFunction<Client, Q, Object> call) {
    @SuppressWarnings("unchecked")
    Object run(Client client, JsonElement request) throws InvalidProtocolBufferException {
      Message.Builder builder = empty.newBuilderForType();
      JsonFormat.parser().merge(request.toString(), builder);
      return call.apply(client, (Q) builder.build());
    }
  }

  private static <Q extends Message> void verb(String name, Q empty, BiFunction<Client, Q, Object> call) {
    VERBS.put(name, new Verb<>(empty, call));
  }

  static {
    verb("generate", GenerateRequest.getDefaultInstance(), Client::generate);
    verb("tokenize", TokenizeRequest.getDefaultInstance(), Client::tokenize);
    verb(
        "detokenize",
        DetokenizeRequest.getDefaultInstance(),
        (client, it) -> DetokenizeResponse.newBuilder().setText(client.detokenize(it)).build());
    verb("score", ScoreRequest.getDefaultInstance(), Client::score);
    verb("import_model", ImportModelRequest.getDefaultInstance(), Client::importModel);
    verb("quantize", QuantizeRequest.getDefaultInstance(), Client::quantize);
    verb("evaluate", EvaluateRequest.getDefaultInstance(), Client::evaluate);
    verb("models", ListModelsRequest.getDefaultInstance(), Client::models);
    verb("jobs", ListJobsRequest.getDefaultInstance(), Client::jobs);
    verb("get_model", GetModelRequest.getDefaultInstance(), (client, it) -> client.getModel(it.getModel()));
    verb("delete_model", DeleteModelRequest.getDefaultInstance(), (client, it) -> nothing(() -> client.deleteModel(it.getModel())));
    verb("verify_model", VerifyModelRequest.getDefaultInstance(), (client, it) -> client.verifyModel(it.getModel()));
    verb("estimate_load", EstimateLoadRequest.getDefaultInstance(), (client, it) -> client.estimateLoad(it.getModel()));
    verb("set_alias", SetAliasRequest.getDefaultInstance(), (client, it) -> nothing(() -> client.setAlias(it.getAlias(), it.getModel())));
    verb("load", LoadRequest.getDefaultInstance(), Client::load);
    verb("unload", UnloadRequest.getDefaultInstance(), Client::unload);
    verb("watch_model", WatchModelRequest.getDefaultInstance(), (client, it) -> client.watchModel(it.getModel()));
    verb("list_schemes", ListSchemesRequest.getDefaultInstance(), (client, it) -> client.listSchemes());
    verb("estimate_quantization", EstimateQuantizationRequest.getDefaultInstance(), Client::estimateQuantization);
    verb("get_job", GetJobRequest.getDefaultInstance(), (client, it) -> client.getJob(it.getId()));
    verb("watch_job", WatchJobRequest.getDefaultInstance(), Client::watchJob);
    verb("wait_job", WatchJobRequest.getDefaultInstance(), (client, it) -> client.waitJob(it.getId()));
    verb("cancel_job", CancelJobRequest.getDefaultInstance(), (client, it) -> client.cancelJob(it.getId()));
    verb("resume_job", ResumeJobRequest.getDefaultInstance(), (client, it) -> client.resumeJob(it.getId()));
    verb("delete_job", DeleteJobRequest.getDefaultInstance(), (client, it) -> nothing(() -> client.deleteJob(it.getId())));
    verb("devices", ListDevicesRequest.getDefaultInstance(), (client, it) -> client.devices());
    verb("info", GetServerInfoRequest.getDefaultInstance(), (client, it) -> client.info());
    verb("watch_runtime", WatchRuntimeRequest.getDefaultInstance(), Client::watchRuntime);
  }

  private static Object nothing(Runnable call) {
    call.run();
    return List.of();
  }

  /** One call; `cancel` may come from the thread that reads the lines. */
  private static final class Call extends Thread {
    private final JsonObject line;
    private final Set<String> told = new TreeSet<>();
    private MessageStream<?> stream;
    private boolean cancelled;

    Call(JsonObject line) {
      if (!KEYS.containsAll(line.keySet())) {
        throw new IllegalArgumentException("unknown keys: " + line.keySet());
      }
      this.line = line;
      setDaemon(true);
      setUncaughtExceptionHandler(Testee::fail);
    }

    synchronized void cancel() {
      cancelled = true;
      if (stream == null) {
        interrupt(); // the means of the language for what waits in a thread
      } else {
        stream.cancel();
      }
    }

    private synchronized void follow(MessageStream<?> started) {
      stream = started;
      if (cancelled) {
        stream.cancel();
      }
    }

    @Override
    public void run() {
      Client client;
      try {
        client = new Client(line.get("target").getAsString(), options(object("options")));
      } catch (IllegalArgumentException refused) {
        JsonObject event = failure("ValueError", "", "", refused.getMessage(), "");
        event.add("metadata", new JsonObject());
        event.add("violations", new JsonArray());
        write("error", event);
        return;
      }
      try {
        Client timed = line.has("timeout_s") ? client.withTimeout(duration(line.get("timeout_s"))) : client;
        Verb<?> verb = VERBS.get(line.get("verb").getAsString());
        if (!read(verb.run(timed, object("request")))) {
          write("dropped", new JsonObject());
          return; // closing the client would do what the drop has to do
        }
        tell("started", "finished", "completed");
        write("end", new JsonObject());
      } catch (LowbitException failed) {
        tell("started", "finished", "completed");
        write("error", describe(failed));
      } catch (IOException impossible) {
        throw new UncheckedIOException(impossible);
      }
      client.close();
    }

    /** Gives all that the verb returned; false when it is dropped. */
    private boolean read(Object result) {
      int cancelAfter = line.has("cancel_after") ? line.get("cancel_after").getAsInt() : 0;
      int dropAfter = line.has("drop_after") ? line.get("drop_after").getAsInt() : 0;
      if (result instanceof Message message) {
        give(message);
        return true;
      }
      if (result instanceof MessageStream<?> started) {
        follow(started);
      }
      try (var closing = result instanceof AutoCloseable it ? it : (AutoCloseable) () -> {}) {
        int count = 0;
        Iterator<?> items =
            result instanceof Stream<?> it ? it.iterator() : ((Iterable<?>) result).iterator();
        while (items.hasNext()) {
          give(items.next());
          count++;
          if (count == cancelAfter) {
            cancel();
          }
          if (count == dropAfter) {
            return false;
          }
        }
        return true;
      } catch (LowbitException failed) {
        throw failed;
      } catch (Exception impossible) {
        throw new IllegalStateException(impossible);
      }
    }

    private void give(Object item) {
      JsonObject event = new JsonObject();
      if (item instanceof Chunk chunk) {
        tell("started");
        event.addProperty("text", chunk.text());
        event.addProperty("output_index", chunk.outputIndex());
        JsonArray ids = new JsonArray();
        chunk.tokenIds().forEach(id -> ids.add(Integer.toUnsignedLong(id)));
        event.add("token_ids", ids);
        JsonArray logprobs = new JsonArray();
        chunk.tokens().stream().filter(Token::hasLogprob).forEach(one -> logprobs.add(one.getLogprob()));
        event.add("logprobs", logprobs);
        write("delta", event);
      } else {
        event.add("message", json((Message) item));
        write("message", event);
      }
    }

    /** Writes facts of a generation once they are known. */
    private void tell(String... names) {
      if (stream instanceof GenerateStream generation) {
        Map<String, Optional<? extends Message>> facts =
            Map.of(
                "started", generation.started(),
                "finished", generation.finished(),
                "completed", generation.completed());
        for (String name : names) {
          if (facts.get(name).isPresent() && told.add(name)) {
            JsonObject event = new JsonObject();
            event.add("message", json(facts.get(name).get()));
            write(name, event);
          }
        }
      }
    }

    private JsonObject describe(LowbitException failed) {
      String name = failed.getClass().getSimpleName().replaceFirst("Exception$", "Error");
      JsonObject event =
          failure(name, failed.code().name(), failed.reason(), failed.getMessage(), failed.requestId());
      JsonObject metadata = new JsonObject();
      failed.metadata().forEach(metadata::addProperty);
      event.add("metadata", metadata);
      JsonArray violations = new JsonArray();
      failed.violations().forEach(one -> violations.add(json(one)));
      event.add("violations", violations);
      failed.retryAfter().ifPresent(wait -> event.addProperty("retry_after_s", wait.toNanos() / 1e9));
      event.addProperty("partial_text", stream instanceof GenerateStream it ? it.partialText() : "");
      return event;
    }

    private static JsonObject failure(
        String name, String code, String reason, String message, String requestId) {
      JsonObject event = new JsonObject();
      event.addProperty("class", name);
      event.addProperty("code", code);
      event.addProperty("reason", reason);
      event.addProperty("message", message);
      event.addProperty("request_id", requestId);
      event.add("retry_after_s", JsonNull.INSTANCE);
      return event;
    }

    private JsonObject object(String key) {
      return line.has(key) ? line.getAsJsonObject(key) : new JsonObject();
    }

    private void write(String kind, JsonObject event) {
      event.add("id", line.get("id"));
      event.addProperty("event", kind);
      synchronized (OUT) {
        OUT.println(event);
        OUT.flush();
      }
    }
  }

  private static JsonObject json(MessageOrBuilder message) {
    try {
      return JsonParser.parseString(JsonFormat.printer().print(message)).getAsJsonObject();
    } catch (InvalidProtocolBufferException impossible) {
      throw new UncheckedIOException(impossible);
    }
  }

  private static Options options(JsonObject line) {
    Options options = new Options();
    for (Map.Entry<String, JsonElement> entry : line.entrySet()) {
      JsonElement value = entry.getValue();
      options =
          switch (entry.getKey()) {
            case "call_timeout_s" -> options.callTimeout(duration(value));
            case "slow_call_timeout_s" -> options.slowCallTimeout(duration(value));
            case "stream_timeout_s" -> options.streamTimeout(duration(value));
            case "resume_timeout_s" -> options.resumeTimeout(duration(value));
            case "max_message_bytes" -> options.maxMessageBytes(value.getAsInt());
            case "keepalive_interval_s" -> options.keepaliveInterval(duration(value));
            case "keepalive_timeout_s" -> options.keepaliveTimeout(duration(value));
            case "max_attempts" -> options.maxAttempts(value.getAsInt());
            case "first_backoff_s" -> options.firstBackoff(duration(value));
            case "max_backoff_s" -> options.maxBackoff(duration(value));
            case "retry_budget" -> options.retryBudget(value.getAsInt());
            case "token" -> options.token(value.getAsString());
            case "traceparent" -> options.traceparent(value::getAsString);
            case "tls" -> options.tls(tls(value.getAsJsonObject()));
            default -> throw new IllegalStateException("unknown option " + entry.getKey());
          };
    }
    return options;
  }

  private static Options.Tls tls(JsonObject line) {
    String name = line.has("server_name") ? line.get("server_name").getAsString() : null;
    return new Options.Tls(file(line, "ca_file"), file(line, "certificate_file"), file(line, "key_file"), name);
  }

  private static String file(JsonObject line, String key) {
    try {
      return line.has(key) ? Files.readString(Path.of(line.get(key).getAsString())) : null;
    } catch (IOException unreadable) {
      throw new UncheckedIOException(unreadable);
    }
  }

  private static Duration duration(JsonElement seconds) {
    return Duration.ofNanos((long) (seconds.getAsDouble() * 1e9));
  }

  private static void fail(Thread call, Throwable failed) {
    failed.printStackTrace();
    Runtime.getRuntime().halt(1); // a call that died would be waited for
  }

  public static void main(String[] arguments) throws IOException {
    Map<Integer, Call> calls = new HashMap<>();
    var input = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    for (String text = input.readLine(); text != null; text = input.readLine()) {
      JsonObject line = JsonParser.parseString(text).getAsJsonObject();
      int id = line.get("id").getAsInt();
      if (line.has("cancel")) {
        calls.get(id).cancel();
      } else {
        calls.put(id, new Call(line));
        calls.get(id).start();
      }
    }
    System.exit(0);
  }
}
