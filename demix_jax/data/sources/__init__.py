"""Where text comes from: files, TensorFlow Datasets, SeqIO and the embedded corpus."""
