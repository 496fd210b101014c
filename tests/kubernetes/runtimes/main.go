// A statically linked program: no shared object reaches it.
package main

import (
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
)

func main() {
	number := func(request *http.Request, name string) int {
		number, _ := strconv.Atoi(request.URL.Query().Get(name))
		return number
	}
	wait := func(request *http.Request) { time.Sleep(time.Duration(number(request, "ms")) * time.Millisecond) }
	http.HandleFunc("/{$}", func(to http.ResponseWriter, _ *http.Request) { fmt.Fprintln(to, "hello") })
	http.HandleFunc("/slow", func(to http.ResponseWriter, request *http.Request) {
		wait(request)
		fmt.Fprintln(to, "done")
	})
	http.HandleFunc("/stream", func(to http.ResponseWriter, request *http.Request) {
		for i := 1; i <= number(request, "n"); i++ {
			fmt.Fprintf(to, "line %d of %d\n", i, number(request, "n"))
			to.(http.Flusher).Flush()
			wait(request)
		}
	})
	http.HandleFunc("/upload", func(to http.ResponseWriter, request *http.Request) {
		bytes, _ := io.Copy(io.Discard, request.Body)
		fmt.Fprintf(to, `{"bytes":%d,"by":"go"}`, bytes)
	})
	panic(http.ListenAndServe(":8080", nil))
}
