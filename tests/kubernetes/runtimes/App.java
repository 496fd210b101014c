import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.io.OutputStream;
import java.net.InetSocketAddress;
import java.util.HashMap;
import java.util.Map;
import java.util.concurrent.Executors;

/** The JDK's own server. */
public class App {
  public static void main(String[] args) throws IOException {
    HttpServer server = HttpServer.create(new InetSocketAddress(8080), 0);
    server.setExecutor(Executors.newCachedThreadPool());
    server.createContext("/", App::answer);
    server.start();
  }

  static void answer(HttpExchange exchange) throws IOException {
    Map<String, Integer> query = new HashMap<>();
    String text = exchange.getRequestURI().getQuery();
    for (String pair : text == null ? new String[0] : text.split("&")) {
      query.put(pair.split("=")[0], Integer.valueOf(pair.split("=")[1]));
    }
    switch (exchange.getRequestURI().getPath()) {
      case "/" -> send(exchange, "hello\n");
      case "/slow" -> {
        sleep(query.get("ms"));
        send(exchange, "done\n");
      }
      case "/stream" -> {
        exchange.sendResponseHeaders(200, 0);
        try (OutputStream body = exchange.getResponseBody()) {
          int n = query.get("n");
          for (int i = 1; i <= n; i++) {
            body.write(("line " + i + " of " + n + "\n").getBytes());
            body.flush();
            sleep(query.get("ms"));
          }
        }
      }
      default -> {
        long bytes = exchange.getRequestBody().transferTo(OutputStream.nullOutputStream());
        send(exchange, "{\"bytes\":" + bytes + ",\"by\":\"java\"}");
      }
    }
  }

  static void send(HttpExchange exchange, String text) throws IOException {
    exchange.sendResponseHeaders(200, text.length());
    try (OutputStream body = exchange.getResponseBody()) {
      body.write(text.getBytes());
    }
  }

  static void sleep(int ms) {
    try {
      Thread.sleep(ms);
    } catch (InterruptedException end) {
      Thread.currentThread().interrupt();
    }
  }
}
