"""What a set of images is worth: alignment with the prompt, picture quality, and how sure the figures are."""
