"""Files that start a sweep's workers elsewhere. Each engine is a function from settings to text;
nothing is submitted."""
