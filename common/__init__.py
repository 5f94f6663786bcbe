"""What all packages share: command lines, configurations, files, images, devices; imports none of them."""
