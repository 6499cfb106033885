"""The protobuf definition of the service `TeacherKV`, and the code generated from it."""
