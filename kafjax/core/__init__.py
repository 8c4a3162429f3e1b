"""Records, parameter-tree helpers, run directories and errors: what every other package stands
on."""
