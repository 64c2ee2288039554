"""One file an op: the maths in its docstring, the public function, schema, fake and autograd."""
