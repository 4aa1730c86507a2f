package io.lowbit;

import com.google.protobuf.Message;
import io.grpc.MethodDescriptor;
import io.lowbit.v1.*;
import java.time.Duration;
import java.util.List;
import java.util.Objects;
import java.util.UUID;
import java.util.function.BiFunction;
import java.util.function.Function;
import java.util.stream.Stream;

/**
 * A connection to one Lowbit server; it connects with its first call. Any number of threads may use
 * it. Every verb throws {@link LowbitException}, or a class of {@link Errors}, when the call failed. A
 * waiting call is cancelled when its thread is interrupted.
 */
public final class Client implements AutoCloseable {
  private static final Duration SERVER_DRAIN = Duration.ofSeconds(30);

  private final Transport transport;
  private final Options options;
  private final Duration timeout;

  /** Makes a client of the server at LOWBIT_ADDRESS, or else at 127.0.0.1:50151. */
  public Client() {
    this(null, new Options());
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
    this.transport = transport;
    this.options = transport.options;
    this.timeout = timeout;
  }

  private static String defaultAddress() {
    String address = System.getenv("LOWBIT_ADDRESS");
    return address == null || address.isEmpty() ? "127.0.0.1:50151" : address;
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
    var exchange =
        transport.open(
            GenerationServiceGrpc.getGenerateMethod(), request, or(options.streamTimeout), null, state::read);
    return new GenerateStream(exchange, state);
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
   * Turns text or a chat into token ids, as {@code generate} would.
   *
   * @param request model and text or chat
   * @return the token ids
   */
  public TokenizeResponse tokenize(TokenizeRequest request) {
    return again(GenerationServiceGrpc.getTokenizeMethod(), request);
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
   * Turns token ids into text.
   *
   * @param request model and token ids
   * @return the text
   */
  public String detokenize(DetokenizeRequest request) {
    return again(GenerationServiceGrpc.getDetokenizeMethod(), request).getText();
  }

  /**
   * Measures how likely continuations of a prompt are.
   *
   * @param request model, prompt and continuations
   * @return natural log-probabilities
   */
  public ScoreResponse score(ScoreRequest request) {
    return transport.call(
        GenerationServiceGrpc.getScoreMethod(), request, or(options.slowCallTimeout), true);
  }

  /**
   * Starts a job that brings a model into the store.
   *
   * @param request name and source; gets a request id when it has none
   * @return the job
   */
  public Job importModel(ImportModelRequest request) {
    String id = id(request.getRequestId(), request.getValidateOnly());
    return again(
            ModelServiceGrpc.getImportModelMethod(), request.toBuilder().setRequestId(id).build())
        .getJob();
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

  /** {@return all models by name; each page is fetched when it is read} */
  public Stream<Model> models() {
    return models(ListModelsRequest.getDefaultInstance());
  }

  /**
   * Lists models; each page is fetched when it is read.
   *
   * @param request size of a page
   * @return the models by name
   */
  public Stream<Model> models(ListModelsRequest request) {
    return pages(
        token ->
            again(
                ModelServiceGrpc.getListModelsMethod(), request.toBuilder().setPageToken(token).build()),
        request.getPageToken(),
        ListModelsResponse::getNextPageToken,
        ListModelsResponse::getModelsList);
  }

  /**
   * Returns a model.
   *
   * @param model name or alias
   * @return the model
   */
  public Model getModel(String model) {
    var request = GetModelRequest.newBuilder().setModel(model).build();
    return again(ModelServiceGrpc.getGetModelMethod(), request).getModel();
  }

  /**
   * Removes a model and its aliases from the store.
   *
   * @param model name or alias
   */
  public void deleteModel(String model) {
    var request = DeleteModelRequest.newBuilder().setModel(model).build();
    once(ModelServiceGrpc.getDeleteModelMethod(), request, options.callTimeout);
  }

  /**
   * Hashes a model's files again.
   *
   * @param model name or alias
   * @return how much was read; DataLossException when a file differs
   */
  public VerifyModelResponse verifyModel(String model) {
    var request = VerifyModelRequest.newBuilder().setModel(model).build();
    return transport.call(
        ModelServiceGrpc.getVerifyModelMethod(), request, or(options.slowCallTimeout), true);
  }

  /**
   * Estimates what a model would take on each device.
   *
   * @param model name or alias
   * @return bytes and times
   */
  public EstimateLoadResponse estimateLoad(String model) {
    var request = EstimateLoadRequest.newBuilder().setModel(model).build();
    return again(ModelServiceGrpc.getEstimateLoadMethod(), request);
  }

  /**
   * Lets an alias point at a model.
   *
   * @param alias the alias
   * @param model the model; empty removes the alias
   */
  public void setAlias(String alias, String model) {
    var request = SetAliasRequest.newBuilder().setAlias(alias).setModel(model).build();
    again(ModelServiceGrpc.getSetAliasMethod(), request);
  }

  /**
   * Starts to load a model; the stream goes on by itself after a broken connection.
   *
   * @param request model, device and replicas
   * @return its progress; closing it before the end cancels the load unless others wait too
   */
  public LoadStream load(LoadRequest request) {
    return new LoadStream(
        transport.open(
            ModelServiceGrpc.getLoadMethod(),
            request,
            or(options.streamTimeout),
            (asked, last) -> asked,
            Function.identity()));
  }

  /**
   * Starts to load a model onto the device with most free memory.
   *
   * @param model name or alias
   * @return its progress
   */
  public LoadStream load(String model) {
    return load(LoadRequest.newBuilder().setModel(model).build());
  }

  /**
   * Takes a model off its devices once its streams have ended.
   *
   * @param request model, and how long streams may take
   * @return what was freed
   */
  public UnloadResponse unload(UnloadRequest request) {
    var given = request.getDrainTimeout();
    Duration drain =
        request.hasDrainTimeout()
            ? Duration.ofSeconds(given.getSeconds(), given.getNanos())
            : SERVER_DRAIN;
    return once(ModelServiceGrpc.getUnloadMethod(), request, options.callTimeout.plus(drain));
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
   * Watches a model.
   *
   * @param model name or alias
   * @return the model now and after each change, until closed
   */
  public MessageStream<WatchModelResponse> watchModel(String model) {
    var request = WatchModelRequest.newBuilder().setModel(model).build();
    return watch(ModelServiceGrpc.getWatchModelMethod(), request, null);
  }

  /**
   * Starts a job that makes a smaller copy of a model.
   *
   * @param request source, target, scheme and gate; gets a request id when it has none
   * @return the job
   */
  public Job quantize(QuantizeRequest request) {
    String id = id(request.getRequestId(), request.getValidateOnly());
    return again(
            QuantizationServiceGrpc.getQuantizeMethod(), request.toBuilder().setRequestId(id).build())
        .getJob();
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
   * Estimates a quantization.
   *
   * @param request source and scheme
   * @return bytes and times
   */
  public EstimateQuantizationResponse estimateQuantization(EstimateQuantizationRequest request) {
    return again(QuantizationServiceGrpc.getEstimateQuantizationMethod(), request);
  }

  /** {@return all schemes, and on which device each can be used} */
  public List<SchemeInfo> listSchemes() {
    var request = ListSchemesRequest.getDefaultInstance();
    return again(QuantizationServiceGrpc.getListSchemesMethod(), request).getSchemesList();
  }

  /**
   * Starts a job that measures a model against another.
   *
   * @param request the models and the text; gets a request id when it has none
   * @return the job
   */
  public Job evaluate(EvaluateRequest request) {
    String id = id(request.getRequestId(), false);
    return again(
            QuantizationServiceGrpc.getEvaluateMethod(), request.toBuilder().setRequestId(id).build())
        .getJob();
  }

  /**
   * Returns a job.
   *
   * @param id id of the job
   * @return the job
   */
  public Job getJob(String id) {
    var request = GetJobRequest.newBuilder().setId(id).build();
    return again(JobServiceGrpc.getGetJobMethod(), request).getJob();
  }

  /** {@return all jobs, newest first; each page is fetched when it is read} */
  public Stream<Job> jobs() {
    return jobs(ListJobsRequest.getDefaultInstance());
  }

  /**
   * Lists jobs; each page is fetched when it is read.
   *
   * @param request states, and size of a page
   * @return the jobs, newest first
   */
  public Stream<Job> jobs(ListJobsRequest request) {
    return pages(
        token ->
            again(JobServiceGrpc.getListJobsMethod(), request.toBuilder().setPageToken(token).build()),
        request.getPageToken(),
        ListJobsResponse::getNextPageToken,
        ListJobsResponse::getJobsList);
  }

  /**
   * Watches a job. The stream goes on by itself after a broken connection, without gap or repeat.
   *
   * @param request id of the job, and the sequence after which to begin
   * @return its events, past ones first, until it ends
   */
  public MessageStream<WatchJobResponse> watchJob(WatchJobRequest request) {
    return watch(
        JobServiceGrpc.getWatchJobMethod(),
        request,
        (asked, last) -> asked.toBuilder().setAfterSequence(last.getSequence()).build());
  }

  /**
   * Watches a job from its beginning.
   *
   * @param id id of the job
   * @return its events, past ones first, until it ends
   */
  public MessageStream<WatchJobResponse> watchJob(String id) {
    return watchJob(WatchJobRequest.newBuilder().setId(id).build());
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
      throw new Errors.JobFailedException(job);
    }
    return job;
  }

  /**
   * Asks a job to stop; one that has ended stays as it is.
   *
   * @param id id of the job
   * @return the job
   */
  public Job cancelJob(String id) {
    var request = CancelJobRequest.newBuilder().setId(id).build();
    return again(JobServiceGrpc.getCancelJobMethod(), request).getJob();
  }

  /**
   * Goes on with a job that was cancelled or interrupted.
   *
   * @param id id of the job
   * @return the job
   */
  public Job resumeJob(String id) {
    var request = ResumeJobRequest.newBuilder().setId(id).build();
    return once(JobServiceGrpc.getResumeJobMethod(), request, options.callTimeout).getJob();
  }

  /**
   * Removes the record of an ended job; what it made stays.
   *
   * @param id id of the job
   */
  public void deleteJob(String id) {
    var request = DeleteJobRequest.newBuilder().setId(id).build();
    once(JobServiceGrpc.getDeleteJobMethod(), request, options.callTimeout);
  }

  /** {@return all devices, their workers and what is loaded} */
  public List<Device> devices() {
    var request = ListDevicesRequest.getDefaultInstance();
    return again(RuntimeServiceGrpc.getListDevicesMethod(), request).getDevicesList();
  }

  /** {@return version, limits and state of the server} */
  public GetServerInfoResponse info() {
    return again(RuntimeServiceGrpc.getGetServerInfoMethod(), GetServerInfoRequest.getDefaultInstance());
  }

  /**
   * Watches memory, queues and throughput.
   *
   * @param request time between two snapshots
   * @return the snapshots, until closed
   */
  public MessageStream<WatchRuntimeResponse> watchRuntime(WatchRuntimeRequest request) {
    return watch(RuntimeServiceGrpc.getWatchRuntimeMethod(), request, null);
  }

  private Duration or(Duration usual) {
    return timeout == null ? usual : timeout;
  }

  /** Makes a call whose second try has the effect of one. */
  private <Q extends Message, R> R again(MethodDescriptor<Q, R> method, Q request) {
    return transport.call(method, request, or(options.callTimeout), true);
  }

  private <Q extends Message, R> R once(MethodDescriptor<Q, R> method, Q request, Duration usual) {
    return transport.call(method, request, or(usual), false);
  }

  private <Q extends Message, R> MessageStream<R> watch(
      MethodDescriptor<Q, R> method, Q request, BiFunction<Q, R, Q> resume) {
    return new MessageStream<>(
        transport.open(method, request, timeout, resume, Function.identity()));
  }

  private static <P, T> Stream<T> pages(
      Function<String, P> fetch,
      String first,
      Function<P, String> next,
      Function<P, List<T>> items) {
    return Stream.iterate(
            fetch.apply(first),
            Objects::nonNull,
            page -> next.apply(page).isEmpty() ? null : fetch.apply(next.apply(page)))
        .flatMap(page -> items.apply(page).stream());
  }

  /** Lets the server recognise a second try. */
  private static String id(String given, boolean validateOnly) {
    boolean keep = validateOnly || !given.isEmpty();
    return keep ? given : UUID.randomUUID().toString().replace("-", "");
  }
}
