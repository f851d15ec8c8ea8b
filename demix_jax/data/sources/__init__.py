"""Sources of text: files, TensorFlow Datasets, SeqIO and the embedded corpus."""
