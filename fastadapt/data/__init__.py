"""Read images: from files on a disk to the tensors that a backbone takes."""
