"""Speed of drawing tokens and images: several samplers, interleaved, against the bandwidth of the memory."""
