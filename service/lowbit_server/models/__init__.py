"""Language models behind one interface: a batch in, logits out."""
