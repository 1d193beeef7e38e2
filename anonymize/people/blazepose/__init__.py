"""The finder that runs Google's BlazePose, hand and face models (Apache-2.0, see NOTICE) through LiteRT."""
