package io.lowbit;

import java.util.List;

/**
 * Text that follows what came before.
 *
 * @param text whole characters; may be empty
 * @param tokenIds its tokens, when {@code output.token_ids} was asked for
 * @param outputIndex which of the n outputs, from 0
 */
public record Chunk(String text, List<Integer> tokenIds, int outputIndex) {
  /** Returns the text alone, so that a chunk can be printed. */
  @Override
  public String toString() {
    return text;
  }
}
