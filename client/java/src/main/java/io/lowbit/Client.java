package io.lowbit;

import com.google.protobuf.Message;
import io.grpc.MethodDescriptor;
import io.lowbit.v1.*;
import java.time.Duration;
import java.util.List;
import java.util.function.BiFunction;
import java.util.function.Function;

/**
 * A connection to one Lowbit server; it connects with its first call. Any number of threads may use
 * it. Every verb throws {@link LowbitException}, or a class of {@link Errors}, when the call failed. A
 * waiting call is cancelled when its thread is interrupted.
 */
public final class Client extends Verbs implements AutoCloseable {
  private static final com.google.protobuf.Duration SERVER_DRAIN =
      com.google.protobuf.Duration.newBuilder().setSeconds(30).build();

  private final Transport transport;
  private final Duration timeout;

  /** Makes a client of the server at LOWBIT_ADDRESS, or else at 127.0.0.1:50151. */
  public Client() {
    this(null);
  }

  /**
   * Makes a client with the default options.
   *
   * @param address HOST:PORT
   */
  public Client(String address) {
    this(address, new Options());
  }

  /**
   * Makes a client.
   *
   * @param address HOST:PORT; null takes LOWBIT_ADDRESS, or else 127.0.0.1:50151
   * @param options limits, timeouts, TLS and token
   * @throws IllegalArgumentException when a token would leave this machine without TLS
   */
  public Client(String address, Options options) {
    this(new Transport(address == null ? defaultAddress() : address, options), null);
  }

  private Client(Transport transport, Duration timeout) {
    super(transport.options);
    this.transport = transport;
    this.timeout = timeout;
  }

  private static String defaultAddress() {
    String address = System.getenv().getOrDefault("LOWBIT_ADDRESS", "");
    return address.isEmpty() ? "127.0.0.1:50151" : address;
  }

  /**
   * Sets the deadline of calls: {@code client.withTimeout(...).generate(...)}.
   *
   * @param value time for a call, over all tries
   * @return this client, its connection included, with this timeout for its calls
   */
  public Client withTimeout(Duration value) {
    return new Client(transport, Options.positive("timeout", value));
  }

  /** Closes the connection; what still runs is cancelled. */
  @Override
  public void close() {
    transport.close();
  }

  /**
   * Starts a generation; the call is under way when this returns.
   *
   * @param request model, prompt and how to sample
   * @return its chunks
   */
  public GenerateStream generate(GenerateRequest request) {
    var state = new GenerateStream.State();
    var rpc = GenerationServiceGrpc.getGenerateMethod();
    return new GenerateStream(
        open(rpc, request, options.streamTimeout, AGAIN, null, state::read), state);
  }

  /**
   * Starts a generation from plain text.
   *
   * @param model name or alias of a loaded model
   * @param prompt the text to go on with
   * @return its chunks
   */
  public GenerateStream generate(String model, String prompt) {
    return generate(GenerateRequest.newBuilder().setModel(model).setText(prompt).build());
  }

  /**
   * Starts the answer to a chat.
   *
   * @param model name or alias of a loaded model
   * @param messages the chat, oldest first
   * @return its chunks
   */
  public GenerateStream generate(String model, List<ChatMessage> messages) {
    Chat chat = Chat.newBuilder().addAllMessages(messages).build();
    return generate(GenerateRequest.newBuilder().setModel(model).setChat(chat).build());
  }

  /**
   * Turns text into token ids.
   *
   * @param model name or alias
   * @param text the text
   * @return the token ids
   */
  public TokenizeResponse tokenize(String model, String text) {
    return tokenize(TokenizeRequest.newBuilder().setModel(model).setText(text).build());
  }

  /**
   * Starts a job that brings a model into the store.
   *
   * @param name name of the new model; must be free
   * @param path folder or GGUF file on the server
   * @return the job
   */
  public Job importModel(String name, String path) {
    ModelSource source = ModelSource.newBuilder().setPath(path).build();
    return importModel(ImportModelRequest.newBuilder().setModel(name).setSource(source).build());
  }

  /**
   * Takes a model off its devices once its streams have ended.
   *
   * @param request model, and how long streams may take
   * @return what was freed
   */
  public UnloadResponse unload(UnloadRequest request) {
    var drain = request.hasDrainTimeout() ? request.getDrainTimeout() : SERVER_DRAIN;
    Duration time = options.callTimeout.plusSeconds(drain.getSeconds()).plusNanos(drain.getNanos());
    return call(ModelServiceGrpc.getUnloadMethod(), request, time, ONCE);
  }

  /**
   * Takes a model off its devices once its streams have ended.
   *
   * @param model name or alias
   * @return what was freed
   */
  public UnloadResponse unload(String model) {
    return unload(UnloadRequest.newBuilder().setModel(model).build());
  }

  /**
   * Starts a job that makes a smaller copy of a model.
   *
   * @param source name or alias of the model
   * @param target name of the copy; must be free
   * @param scheme how its weights are stored
   * @return the job
   */
  public Job quantize(String source, String target, Scheme scheme) {
    return quantize(
        QuantizeRequest.newBuilder().setSource(source).setTarget(target).setScheme(scheme).build());
  }

  /**
   * Waits for the end of a job.
   *
   * @param id id of the job
   * @return the job, if it succeeded
   * @throws Errors.JobFailedException if it did not
   */
  public Job waitJob(String id) {
    Job job = null;
    for (WatchJobResponse event : watchJob(id)) {
      job = event.getJob();
    }
    job = job == null ? getJob(id) : job;
    if (job.getState() != JobState.JOB_STATE_SUCCEEDED) {
      throw new Errors.JobFailedException(new Failure(job));
    }
    return job;
  }

  @Override
  <Q extends Message, R> R call(
      MethodDescriptor<Q, R> rpc, Q request, Duration usualTimeout, boolean again) {
    Exchange<Q, R, R> exchange = open(rpc, request, usualTimeout, again, null, Function.identity());
    R answer = exchange.take();
    exchange.take(); // the status comes behind the answer
    return answer;
  }

  @Override
  <Q extends Message, R, T> Exchange<Q, R, T> open(
      MethodDescriptor<Q, R> rpc,
      Q request,
      Duration usualTimeout,
      boolean again,
      BiFunction<Q, R, Q> resume,
      Function<R, T> convert) {
    Duration time = timeout == null ? usualTimeout : timeout;
    return new Exchange<>(transport, rpc, request, time, again, resume, convert);
  }
}
