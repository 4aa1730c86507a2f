package io.lowbit;

import io.lowbit.v1.Token;
import java.util.List;

/**
 * Text that follows what came before.
 *
 * @param text whole characters; may be empty
 * @param tokenIds its tokens, when {@code output.token_ids} was asked for
 * @param tokens the same with their log-probabilities, when {@code output.logprobs} was asked for
 * @param outputIndex which of the n outputs, from 0
 */
public record Chunk(String text, List<Integer> tokenIds, List<Token> tokens, int outputIndex) {
  /** Returns the text alone, so that a chunk can be printed. */
  @Override
  public String toString() {
    return text;
  }
}
