"""TFDS builders of the generated corpora. Importing a builder needs the extra `[data]`; nothing
else in kafjax imports one at the top."""
